"""Pooling: one vector for a text out of those of its tokens, in the way that sentence-transformers files state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from invarlock.api import InputError, read_json


@dataclass(frozen=True)
class Pooling:
    """Ways to pool, whose vectors are put side by side."""

    modes: tuple[str, ...] = ("mean",)

    @classmethod
    def stated(cls, path: Path) -> Pooling:
        """The pooling that its configuration states.

        :raises InputError: it asks for a way to pool that is not known.
        """
        modes = _modes(read_json(path))
        if unknown := [mode for mode in modes if mode not in WAYS]:
            raise InputError(f"{path}: pooling {unknown[0]!r} is none of {', '.join(WAYS)}")
        return cls(modes or cls.modes)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors (texts, numbers) from those of the tokens, (texts, tokens, size), and the mask of real tokens."""
        mask = mask.to(hidden.device)
        return torch.cat([WAYS[mode](hidden.float(), mask.unsqueeze(2).float()) for mode in self.modes], dim=1)


def _modes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Of the configuration of a pooling module, in either of its forms: one name, or a switch for each."""
    if isinstance(config.get("pooling_mode"), str):
        return (config["pooling_mode"],)
    prefix = "pooling_mode_"
    return tuple(
        SWITCHES.get(key, key.removeprefix(prefix)) for key, on in config.items() if key.startswith(prefix) and on
    )


SWITCHES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
}
"""Keys whose mode goes by another name than their own."""


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


def _weighted_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
    return _mean(hidden, mask * places)


def _last(hidden: Tensor, mask: Tensor) -> Tensor:
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.squeeze(2).sum(dim=1).long() - 1]


WAYS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": lambda hidden, mask: hidden[:, 0],
    "max": lambda hidden, mask: hidden.masked_fill(mask == 0, -torch.inf).amax(dim=1),
    "lasttoken": _last,
    "mean_sqrt_len_tokens": lambda hidden, mask: (hidden * mask).sum(dim=1) / mask.sum(dim=1).sqrt(),
    "weightedmean": _weighted_mean,
}
