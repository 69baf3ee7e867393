"""Checks of a configuration against the stored tensors, before a model is built from it.

A number in ``config.json`` can ask for a million layers; the stored tensors bound how many there can be.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import TYPE_CHECKING, Any

from invarlock.api import InputError

if TYPE_CHECKING:
    from invarlock.api import Checkpoint

COUNTS = re.compile(r"((?<!feature_)layers?|blocks?|labels|depth|experts|stages|heads)$")
"""Keys that count modules; ``vision_feature_layer`` is the place of one."""
FEW = 1000
"""Counts up to this one are always accepted: not every expert and head has a tensor of its own."""
MODULES_PER_TENSOR = 10
"""Modules, including those without weights: a layer of Llama has 14 for its 9 tensors."""
EXCESS = 4
"""Parameters per stored number. Some may be missing, which is reported tensor by tensor; a head can be most of a
small model."""
PACKED_BITS = 8
"""Parameters per stored byte, at one bit each."""
BUFFERS = 2**28
"""Numbers in computed masks and tables: a mask of 16384 x 16384."""


def check_counts(config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Check the counts in a configuration.

    :raises InputError: ``config.json`` counts more modules than the stored tensors allow.
    """
    most = max(FEW, len(checkpoint))
    for key, value in _numbers(config):
        if COUNTS.search(key) and not 0 <= value <= most:
            raise _disagrees(checkpoint, f"{key} is {value}, but only {len(checkpoint)} tensors are stored")


def check_size(config: Any, make: Any, checkpoint: Checkpoint) -> None:
    """Build the model without weights and compare its size with the stored tensors.

    :param config: the configuration as transformers has it.
    :param make: builds the model.
    :raises InputError: it is larger than the tensors allow.
    """
    import torch

    if not getattr(config.get_text_config(decoder=True), "num_hidden_layers", 1):
        raise _disagrees(checkpoint, "num_hidden_layers is 0")
    with warnings.catch_warnings(), _at_most_modules(checkpoint), torch.device("meta"):
        # Of tensors without numbers, which are refused below.
        warnings.simplefilter("ignore")
        model = make()
    empty = next((name for name, weight in model.named_parameters() if weight.numel() == 0), None)
    if empty is not None:
        raise _disagrees(checkpoint, f"{empty} would have no numbers")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if parameters > _most_parameters(config, checkpoint):
        raise _disagrees(checkpoint, f"it describes {parameters:,} parameters, far more than are stored")
    computed = sum(buffer.numel() for buffer in model.buffers())
    if computed > BUFFERS:
        raise _disagrees(checkpoint, f"its masks and tables take {computed:,} numbers")


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

    numbers, most = count(1), MODULES_PER_TENSOR * len(checkpoint) + FEW

    def counted(module: Any, name: str, submodule: Any) -> None:
        if next(numbers) > most:
            raise _disagrees(checkpoint, f"it describes more than {most} modules for {len(checkpoint)} tensors")

    handle = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        handle.remove()


def _disagrees(checkpoint: Checkpoint, why: str) -> InputError:
    return InputError(f"{checkpoint.folder}: config.json does not fit the weights: {why}")
