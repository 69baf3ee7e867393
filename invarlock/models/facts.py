"""Facts of a model that measuring needs: its class, vocabulary, context and device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from invarlock.core.errors import PluginError
from invarlock.models.structure import input_embeddings, reads_images_alone

Predicted = Literal["causal", "masked", "seq2seq"]
"""Tokens that a language model predicts: the next one, masked ones, or the target of a source."""


@dataclass(frozen=True)
class ModelClass:
    """The class of a model, as far as it is known before the weights are loaded."""

    names: tuple[str, ...]
    """Its own name, where there is a model, then those that its configuration gives as ``architectures``."""
    encoder_decoder: bool = False

    @classmethod
    def of(cls, model: nn.Module) -> ModelClass:
        config = getattr(model, "config", None)
        declared = getattr(config, "architectures", None) or []
        return cls((type(model).__name__, *declared), bool(getattr(config, "is_encoder_decoder", False)))

    @classmethod
    def declared(cls, config: Mapping[str, Any]) -> ModelClass:
        """:param config: as ``config.json`` holds it."""
        names = config.get("architectures")
        # Whoever loads it complains of anything else.
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            names = []
        return cls(tuple(names), bool(config.get("is_encoder_decoder")))


def task_of(model: nn.Module) -> Predicted:
    """Tokens that a language model predicts, by its class.

    :param model: a transformers model, or one with a ``config`` and a class name like theirs.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "seq2seq"
    names = [type(model).__name__, *(getattr(config, "architectures", None) or [])]
    return "masked" if any(name.endswith("ForMaskedLM") for name in names) else "causal"


def vocabulary_of(model: nn.Module) -> int:
    """Number of tokens in the vocabulary: the last dimension of the logits; 0 for a model of images alone.

    :raises PluginError: its configuration does not state it.
    """
    size = getattr(text_config_of(model), "vocab_size", None)
    if size is None and reads_images_alone(model):
        return 0
    if size is None:
        raise PluginError(f"{type(model).__name__}: an adapter's model must state config.vocab_size")
    return int(size)


def context_of(model: nn.Module) -> int | None:
    """Largest number of tokens that the model reads at once, or None where it states no limit."""
    positions = getattr(text_config_of(model), "max_position_embeddings", None) or 0
    for name, module in model.named_modules():
        # RoBERTa and its kin number positions from padding_idx + 1: of 514, 512 can be used.
        if name.endswith("position_embeddings") and isinstance(getattr(module, "padding_idx", None), int):
            positions -= module.padding_idx + 1
    return positions if positions > 0 else None


def device_of(model: nn.Module) -> torch.device:
    """Device of the input embeddings, where the model takes its token ids."""
    embeddings = input_embeddings(model)
    device = next((model if embeddings is None else embeddings).parameters()).device
    # Offloaded embeddings are on meta until their layer runs; its hook then moves what it is given.
    return torch.device("cpu") if device.type == "meta" else device


def is_streamed(model: nn.Module) -> bool:
    """True if the model's weights are on disk, and read at each use."""
    return hasattr(model, "streaming")


def logits_of(model: nn.Module, output: Any) -> Tensor:
    """The logits (batch, length, vocabulary) of a model's output.

    :raises PluginError: the output has none.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise PluginError(
            f"{type(model).__name__}: forward returned a {type(output).__name__} without .logits; an adapter's model "
            "must return an object with .logits (batch, length, vocabulary)"
        )
    return logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module's own training flag is put back whatever happens."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Not inference_mode: buffers that a model makes on the way would be unfit for a guard's gradients.
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def text_config_of(model: nn.Module) -> Any:
    """Configuration of the part that reads text; None where the model has no configuration."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def unread_tensors_of(model: nn.Module) -> frozenset[str]:
    """Names of the checkpoint's tensors that have no place in the model, as far as its adapter has noted them."""
    return frozenset(getattr(model, "unread_tensors", ()))


def own_code_of(loaded: object) -> str | None:
    """The file beside a checkpoint's weights that defines the class of what was loaded; None where a library does."""
    # The package that transformers makes of such files.
    package, _, module = type(loaded).__module__.rpartition(".")
    return f"{module}.py" if package.partition(".")[0] == "transformers_modules" else None
