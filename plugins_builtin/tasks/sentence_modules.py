"""Modules of a sentence-transformers folder, applied to a model's hidden states: pooling, dense layers, unit length.

The library need not be installed: ``modules.json`` lists the modules, and each has a folder of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from invarlock.api import InputError, complaints_of, read_json
from plugins_builtin.tasks.pooling import Pooling

MODULES, CONFIG, WEIGHTS = "modules.json", "config.json", "model.safetensors"
NO_CHANGE = ("Transformer", "Dropout")
"""Modules that come before the others, or do nothing while a model is measured."""
ACTIVATIONS = {kind.__name__: kind for kind in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)}

log = logging.getLogger("invarlock")

Step = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SentenceModules:
    """Pooling, and the steps after it."""

    pooling: Pooling = field(default_factory=Pooling)
    steps: Sequence[Step] = ()

    @classmethod
    def stated(cls, folder: Path) -> SentenceModules | None:
        """The modules that a folder lists, or None.

        :raises InputError: one of them cannot be read.
        """
        if not (folder / MODULES).is_file():
            return None
        pooling, steps = Pooling(), list[Step]()
        for entry in _listed(folder):
            kind, path = str(entry.get("type", "")).rpartition(".")[2], folder / str(entry.get("path", ""))
            if kind == "Pooling":
                pooling = Pooling.stated(path / CONFIG)
            elif kind == "Normalize":
                steps.append(_unit)
            elif kind == "Dense":
                steps.append(Dense.stated(path))
            elif kind not in NO_CHANGE:
                log.warning("%s: %s is not known: vectors are judged without it", folder / MODULES, kind)
        return cls(pooling, steps)

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Vectors (texts, numbers) from those of the tokens, (texts, tokens, size), and the mask of real tokens."""
        vectors = self.pooling(hidden, mask)
        for step in self.steps:
            vectors = step(vectors)
        return vectors


@dataclass(frozen=True, eq=False)
class Dense:
    """A linear layer and its activation."""

    weight: Tensor
    bias: Tensor | None
    activation: Step

    @classmethod
    def stated(cls, folder: Path) -> Dense:
        """:raises InputError: it lacks its weights, or asks for an activation that is not known."""
        name = str(read_json(folder / CONFIG).get("activation_function", "Tanh")).rpartition(".")[2]
        if name not in ACTIVATIONS:
            raise InputError(f"{folder / CONFIG}: activation {name!r} is none of {', '.join(ACTIVATIONS)}")
        with complaints_of(
            f"{folder / WEIGHTS}: cannot be read; a dense layer is stored as linear.weight, linear.bias"
        ):
            from safetensors.torch import load_file

            stored = load_file(folder / WEIGHTS)
            weight, bias = stored["linear.weight"].float(), stored.get("linear.bias")
        return cls(weight, None if bias is None else bias.float(), ACTIVATIONS[name]())

    def __call__(self, vectors: Tensor) -> Tensor:
        weight, bias = (None if each is None else each.to(vectors.device) for each in (self.weight, self.bias))
        if weight is None or weight.shape[1:] != vectors.shape[1:]:
            raise InputError(f"a dense layer of shape {tuple(self.weight.shape)} follows vectors of {vectors.shape[1]}")
        return self.activation(functional.linear(vectors, weight, bias))


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, dim=1)


def _listed(folder: Path) -> list[Mapping[str, Any]]:
    try:
        entries = json.loads((folder / MODULES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / MODULES}: cannot be read: {error}") from error
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f"{folder / MODULES}: expected a list of modules")
    return entries
