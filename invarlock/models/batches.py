"""Number of windows that go through a model at once: what suits its device, and what it has memory for."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import nn

from invarlock.core.errors import UsageError
from invarlock.models.facts import device_of, text_config_of, vocabulary_of
from invarlock.models.sizes import sizes_of

log = logging.getLogger("invarlock")


def batch_size(model: nn.Module, length: int) -> int:
    """Number of windows of ``length`` tokens that go through the model at once.

    A batch has at most the logits and the tokens that suit the model's device, but one window at least.
    """
    sizes = sizes_of(device_of(model))
    logits = 4 * length * max(1, vocabulary_of(model))
    return max(1, min(sizes.logits // logits, sizes.batch_tokens // length))


def cached_batch_size(model: nn.Module, length: int) -> int:
    """Number of windows that are written at once, of which only keys, values and the last token's logits are there."""
    size = _cached_bytes(model)
    # Each step reads all weights, whatever the number of windows.
    return max(1, sizes_of(device_of(model)).cache // (size * length)) if size else batch_size(model, length)


def _cached_bytes(model: nn.Module) -> int:
    """Bytes of the keys and values of one token; 0 where the configuration does not tell."""
    config: Any = text_config_of(model)
    layers, hidden, heads, shared = (
        getattr(config, name, None) or 0
        for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")
    )
    width = (shared or heads) * (getattr(config, "head_dim", None) or (hidden // heads if heads else 0))
    return int(2 * layers * width * next(model.parameters()).element_size())


def halved(model: nn.Module, count: int, length: int, error: torch.OutOfMemoryError, *, one_only: bool = False) -> int:
    """Half the number of windows that a device had no memory for; said once.

    :param one_only: the number must not change, for other processes have the same one.
    :raises UsageError: it was a single window.
    """
    device = device_of(model)
    if count == 1 or one_only:
        raise UsageError(
            f"model.device: {device} has no memory for a batch of {count} x {length} tokens besides the model; lower "
            "dataset.seq_len, or choose another device"
        ) from error
    _tell_once(f"{device} has no memory for {count} windows at once; going on with {count // 2}")
    return count // 2


@cache
def _tell_once(message: str) -> None:
    log.warning(message)
