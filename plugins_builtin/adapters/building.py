"""A configuration, held against the tensors that are stored, before a model is built as it says.

A number in ``config.json`` can ask for a million layers; what is stored tells how many there can be.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from invarlock.api import UsageError

if TYPE_CHECKING:
    from invarlock.api import Checkpoint

COUNTS = re.compile(r"(layers?|blocks?|labels|depth|experts|stages|heads)$")
"""Keys that say how many of something are built, one by one."""
FEW = 1000
"""So many are built in a moment, whatever is stored: not every expert and head has a tensor of its own."""
MODULES_PER_TENSOR = 10
"""Modules, those without weights too: a layer of Llama has 14 for its 9 tensors."""
EXCESS = 4
"""Parameters for each stored number. Some may be missing, which is said tensor by tensor; a head can be most of a small
model."""
PACKED_BITS = 8
"""Parameters in a stored byte, at a bit for each."""
BUFFERS = 2**28
"""Numbers in masks and tables that are computed: a mask of 16384 x 16384."""


def check_counts(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """:raises UsageError: ``config.json`` counts more of something than can be stored."""
    most = max(FEW, len(checkpoint))
    for key, value in _numbers(config):
        if COUNTS.search(key) and not 0 <= value <= most:
            raise _disagrees(checkpoint, f"{key} is {value}, and {len(checkpoint)} tensors are stored")


def check_size(config: Any, make: Any, checkpoint: Checkpoint) -> None:
    """Build the model without weights, and compare how large it is with what is stored.

    :param config: the configuration as transformers has it.
    :param make: builds the model.
    :raises UsageError: it is too large for it, or has no language-model head.
    """
    import torch

    from invarlock.api import output_head

    if not getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1):
        raise _disagrees(checkpoint, "num_hidden_layers is 0")
    with warnings.catch_warnings(), _at_most_modules(checkpoint), torch.device("meta"):
        # Of tensors without numbers, which are refused below.
        warnings.simplefilter("ignore")
        model = make()
    if output_head(model) is None:
        raise UsageError(
            f"model.id: {checkpoint.folder}: {type(model).__name__}, which architectures in config.json names, has no "
            "language-model head, so that nothing it predicts can be measured; name one that has, as LlamaForCausalLM"
        )
    empty = next((name for name, weight in model.named_parameters() if weight.numel() == 0), None)
    if empty is not None:
        raise _disagrees(checkpoint, f"{empty} would have no numbers")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > _most_parameters(config, checkpoint):
        raise _disagrees(checkpoint, f"it describes {parameters:,} parameters, far more than are stored")
    computed = sum(buffer.numel() for buffer in model.buffers())
    if computed > BUFFERS:
        raise _disagrees(checkpoint, f"it asks for {computed:,} numbers in masks and tables")


def _most_parameters(config: Any, checkpoint: Checkpoint) -> int:
    entries = checkpoint.entries.values()
    if getattr(config, "quantization_config", None) is not None:
        return PACKED_BITS * sum(entry.nbytes for entry in entries)
    return EXCESS * sum(entry.nbytes // entry.dtype.itemsize for entry in entries)


def _numbers(section: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int):
            yield key, value


@contextmanager
def _at_most_modules(checkpoint: Checkpoint) -> Iterator[None]:
    from torch.nn.modules.module import register_module_module_registration_hook

    count, most = 0, MODULES_PER_TENSOR * len(checkpoint) + FEW

    def counted(module: Any, name: str, submodule: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise _disagrees(checkpoint, f"it describes more than {most} modules for {len(checkpoint)} tensors")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _disagrees(checkpoint: Checkpoint, why: str) -> UsageError:
    return UsageError(f"model.id: {checkpoint.folder}: config.json does not fit the weights: {why}")
