"""Changes of weights, named by the formats that an edited checkpoint stores them in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from invarlock.checkpoints.storage import StoredWeight, weights_in
from invarlock.core.results import EditedWeight
from invarlock.quantization.changes import CHANGED

BY_ROUNDING = re.compile(rf"{CHANGED}|a grid of .*|.* zeros, the others changed")
"""Changes that rounding to a format explains; what else a weight is called stays."""


def formats_of(model: nn.Module, checkpoint: Path) -> dict[str, StoredWeight]:
    """Formats of weights that a checkpoint stores as codes, by the names that the model has for their parameters."""
    stored = {name: weight for name, weight in weights_in(checkpoint).items() if weight.bits is not None}
    if checkpoint.suffix == ".gguf" and stored:
        names = _names_in_gguf(model, checkpoint)
        return {name: stored[theirs] for name, theirs in names.items() if theirs in stored}
    return stored


def named_by_format(changes: Sequence[EditedWeight], formats: Mapping[str, StoredWeight]) -> list[EditedWeight]:
    """Changes of weights, those that rounding explains by the names of their formats."""
    return [_named(change, formats.get(change.name) or formats.get(f"{change.name}.weight")) for change in changes]


def _named(change: EditedWeight, stored: StoredWeight | None) -> EditedWeight:
    if stored is None or not BY_ROUNDING.fullmatch(change.change):
        return change
    return replace(change, change=stored.change, bits=stored.bits)


def _names_in_gguf(model: nn.Module, file: Path) -> dict[str, str]:
    """The name in a file of each parameter, where the library that defines these names knows it."""
    import gguf

    field = gguf.GGUFReader(file).get_field("general.architecture")
    architectures = {name: architecture for architecture, name in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures.get(field.contents() if field else None)
    if architecture is None:
        return {}
    names = gguf.get_tensor_name_map(architecture, len(model.state_dict()))
    found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name, _ in model.named_parameters()}
    return {name: theirs for name, theirs in found.items() if theirs}
