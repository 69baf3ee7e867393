"""Changes of weights, named by the formats that an edited checkpoint stores them in."""

from __future__ import annotations

import re
from collections import defaultdict
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
    return stored | _converted(model, stored)


def named_by_format(changes: Sequence[EditedWeight], formats: Mapping[str, StoredWeight]) -> list[EditedWeight]:
    """Changes of weights, those that rounding explains by the names of their formats."""
    return [_named(change, formats.get(change.name) or formats.get(f"{change.name}.weight")) for change in changes]


def _named(change: EditedWeight, stored: StoredWeight | None) -> EditedWeight:
    if stored is None or not BY_ROUNDING.fullmatch(change.change):
        return change
    return replace(change, change=stored.change, bits=stored.bits)


def _converted(model: nn.Module, stored: Mapping[str, StoredWeight]) -> dict[str, StoredWeight]:
    """Formats of parameters that transformers makes of tensors of other names, as of a layer's experts one by one.

    Left out is what is made of tensors in several formats.
    """
    from transformers import PreTrainedModel
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not isinstance(model, PreTrainedModel):
        return {}
    mapping, wanted = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    of_parameter: defaultdict[str, list[StoredWeight]] = defaultdict(list)
    for theirs, weight in stored.items():
        name, _ = loading.rename_source_key(theirs, renamings, converters, model.base_model_prefix, wanted)
        if name in wanted and theirs not in wanted:
            of_parameter[name].append(weight)
    return {name: parts[0] for name, parts in of_parameter.items() if len({part.change for part in parts}) == 1}


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
