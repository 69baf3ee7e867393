"""Checkpoints whose tensors are not the model's parameters one by one: experts stored each by itself, other names.

Transformers' own conversions turn the ones into the others, and back.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from invarlock.api import Checkpoint, NotStreamedError, Part, one_line

ROTARY = r"rotary_emb\.inv_freq"
"""Older files store it."""


@dataclass(frozen=True)
class Converted(Part):
    """Tensors that a conversion of transformers turns into parameters.

    ``patterns`` holds the conversion's source pattern for each tensor, ``renamed`` its name after plain renamings.
    """

    conversion: Any
    patterns: tuple[str, ...]
    renamed: tuple[str, ...]
    model: Any
    converts = True

    def load(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        conversion, first = copy.deepcopy(self.conversion), self.parameters[0]
        for name, pattern in zip(self.stored, self.patterns, strict=True):
            conversion.add_tensor(first, name, pattern, partial(read, name))
        return _single(conversion.convert(first, model=self.model, config=self.model.config))

    def store(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        conversion = self.conversion.reverse_transform()
        for name in self.parameters:
            first, pattern = conversion.rename_source_key(name)
            conversion.add_tensor(first, name, pattern, weights[name])
        made = _single(conversion.convert(first, model=self.model, config=self.model.config))
        names = dict(zip(self.renamed, self.stored, strict=True))
        return {names[name]: tensor.contiguous() for name, tensor in made.items()}


def parts_of(model: Any, checkpoint: Checkpoint) -> list[Part]:
    """Parameters and buffers of a model, each with the tensors of a checkpoint that it is made of.

    :param model: with empty weights.
    :raises InputError: a conversion does not fit the checkpoint, or cannot be undone.
    """
    from transformers import core_model_loading as loading
    from transformers.conversion_mapping import get_model_conversion_mapping

    mapping, wanted = get_model_conversion_mapping(model), model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, loading.WeightConverter)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    plain: list[Part] = []
    collected: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
    # In the order that conversions rely on.
    for stored in sorted(checkpoint, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(stored, renamings, converters, model.base_model_prefix, wanted)
        if name not in wanted and stored in wanted:
            name, pattern = stored, None
        if name in wanted and pattern is None:
            plain.append(Part((name,), (stored,)))
        elif name in wanted:
            collected[name].append((stored, pattern, loading.apply_renamings(stored, renamings)))
    converted = (
        _converted(model, checkpoint, of_pattern[tensors[0][1]], name, tensors) for name, tensors in collected.items()
    )
    return [*plain, *converted]


def left_over(model: Any, stored: Iterable[str], parts: Iterable[Part]) -> tuple[str, ...]:
    """Names of stored tensors that are part of nothing, without those that transformers passes over, too."""
    known = {name for part in parts for name in part.stored}
    ignored = [ROTARY, *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    left = (name for name in stored if name not in known)
    return tuple(sorted(name for name in left if not any(re.search(pattern, name) for pattern in ignored)))


def _converted(
    model: Any, checkpoint: Checkpoint, conversion: Any, name: str, tensors: Iterable[tuple[str, str, str]]
) -> Part:
    """A conversion, tried on tensors that have shapes alone."""
    stored, patterns, renamed = zip(*tensors, strict=True)
    part = Converted((name,), stored, conversion, patterns, renamed, model)

    def empty(tensor: str) -> Tensor:
        entry = checkpoint.entries[tensor]
        return torch.empty(entry.shape, dtype=entry.dtype, device="meta")

    refusal = f"{checkpoint.folder}: cannot be streamed, {name} cannot be made of {stored[0]}"
    try:
        made = part.load(empty)
        part = Converted(tuple(made), stored, conversion, patterns, renamed, model)
        if any(tensor.shape != model.get_parameter(of).shape for of, tensor in made.items()):
            # Something is missing, and whoever takes in the parameter says so.
            return part
        back = {of: tuple(tensor.shape) for of, tensor in part.store(made).items()}
    except (KeyError, ValueError, RuntimeError, IndexError, AttributeError) as error:
        raise NotStreamedError(f"{refusal}: {one_line(error)}") from error
    if back != {of: checkpoint.entries[of].shape for of in stored}:
        raise NotStreamedError(f"{refusal} and back")
    return part


def _single(made: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}
