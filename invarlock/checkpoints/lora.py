"""A LoRA adapter in the layout of peft, merged into the weights of its base: ``W + scale * B A``.

``scale`` is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora`` (Hu et al., LoRA, 2021; Kalajdzievski,
A Rank Stabilization Scaling Factor, 2023). The sum is float32, rounded to the data type of the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from invarlock.checkpoints.soundness import ADAPTER, check_file, read_json
from invarlock.checkpoints.streaming import streaming_of
from invarlock.core.errors import InputError, one_line
from invarlock.core.paths import absolute

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""Path of the base in the model that peft makes of it."""
LOW_RANK = re.compile(r"(.+)\.(lora_|lora_embedding_)([AB])((?:\.weight)?)$")
UNMERGED = ("use_dora", "use_qalora", "alora_invocation_tokens", "layer_replication", "megatron_config")
"""Options of LoRA by which more is done than the sum."""


@dataclass(frozen=True)
class LowRank:
    """The update of one weight: (rank, in), (out, rank), and the factor of their product."""

    down: Tensor
    up: Tensor
    scale: float
    transposed: bool
    """True where the weight is (in, out)."""

    def added_to(self, weight: Tensor) -> Tensor:
        delta = self.scale * (self.up.float() @ self.down.float()).to(weight.device)
        return (weight.float() + (delta.mT if self.transposed else delta)).to(weight.dtype)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight."""
        shape = len(self.up), self.down.shape[1]
        return shape[::-1] if self.transposed else shape


@dataclass(frozen=True)
class LoraAdapter:
    """An adapter folder of peft."""

    folder: Path
    base: str | None
    """The model that it names."""
    updates: Mapping[str, LowRank]
    """By the name of the parameter in the base."""
    replaced: Mapping[str, Tensor]
    """Parameters that are stored whole (``modules_to_save``, biases)."""

    @classmethod
    def read(cls, folder: Path) -> LoraAdapter:
        """:raises InputError: it is broken, or no plain LoRA."""
        settings = read_json(folder / ADAPTER)
        if (kind := settings.get("peft_type")) != "LORA":
            raise InputError(f"{absolute(folder)} is an adapter of type {kind}; only LORA can be merged")
        for option in UNMERGED:
            if settings.get(option):
                raise InputError(f"{absolute(folder)}: {option} is set, and only plain LoRA can be merged")
        tensors = {_in_base(name): tensor for name, tensor in _tensors(folder).items()}
        updates = dict(_updates(folder, settings, tensors))
        replaced = {name: tensor for name, tensor in tensors.items() if not LOW_RANK.match(name)}
        if magnitudes := [name for name in replaced if ".lora_" in name]:
            raise InputError(
                f"{absolute(folder)}: {magnitudes[0]} is not part of plain LoRA, the only kind that can be merged"
            )
        return cls(folder, settings.get("base_model_name_or_path"), updates, replaced)

    @property
    def described(self) -> str:
        ranks = sorted({len(update.down) for update in self.updates.values()})
        shown = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "no rank"
        return f"LoRA, {shown}, merged for the comparison"

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> None:
        """Merge the adapter into its base, in memory, or as the weights are read where they stay on disk.

        :raises InputError: it is for other modules, or for weights of other shapes.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._check(parameters)
        if streaming := streaming_of(model):
            # By the name that a tied weight is stored under.
            names = {streaming.stored[name]: name for name in (*self.updates, *self.replaced)}
            streaming.put(lambda stored, weight: self._merged(names.get(stored, stored), weight))
            return
        for name in (*self.updates, *self.replaced):
            parameters[name].copy_(self._merged(name, parameters[name]))

    def _merged(self, name: str, weight: Tensor) -> Tensor:
        if name in self.replaced:
            weight = self.replaced[name].to(weight.device, weight.dtype)
        return self.updates[name].added_to(weight) if name in self.updates else weight

    def _check(self, parameters: Mapping[str, Tensor]) -> None:
        shapes: dict[str, tuple[int, ...]] = {name: update.shape for name, update in self.updates.items()}
        shapes |= {name: tuple(tensor.shape) for name, tensor in self.replaced.items()}
        for name, shape in shapes.items():
            if name not in parameters:
                raise InputError(f"{absolute(self.folder)} is an adapter for {name}, which the baseline lacks")
            if tuple(parameters[name].shape) != shape:
                has = f"the baseline's has {tuple(parameters[name].shape)}"
                raise InputError(f"{absolute(self.folder)}: {name} would need the shape {shape}, and {has}")


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER).is_file()


def _in_base(name: str) -> str:
    """The name of an adapter's tensor without the modules that peft puts around those of the base."""
    return name.removeprefix(PREFIX).replace(".base_layer.", ".")


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{absolute(folder)} has no {WEIGHTS}")
    check_file(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{absolute(path)} cannot be read: {one_line(error)}") from error


def _updates(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, LowRank]]:
    found = {name: match for name in tensors if (match := LOW_RANK.match(name))}
    for name, match in found.items():
        module, kind, part, suffix = match.groups()
        other = f"{module}.{kind}{'B' if part == 'A' else 'A'}{suffix}"
        if other not in tensors:
            raise InputError(f"{absolute(folder / WEIGHTS)}: {name} is stored, and {other} is not")
        if part == "B":
            continue
        down, up = tensors[name], tensors[other]
        if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise InputError(f"{absolute(folder / WEIGHTS)}: {name} and its B have shapes {shapes}, not those of LoRA")
        scale = _scale(settings, module, len(down))
        transposed = kind == "lora_embedding_" or bool(settings.get("fan_in_fan_out"))
        yield f"{module}.weight", LowRank(down, up, scale, transposed)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    of_modules = settings.get("alpha_pattern") or {}
    # As peft looks patterns up: each is the end of a name.
    own = (alpha for pattern, alpha in of_modules.items() if re.match(rf"(.*\.)?({pattern})$", module))
    alpha = float(next(own, settings.get("lora_alpha", rank)))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
