"""Reach: modules that ran while windows passed through the model, and those that never did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from invarlock.models.structure import block_of, find_blocks


class Reached:
    """Tap that notes whether a module was called."""

    def __init__(self) -> None:
        self._called = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._called = True

    def result(self) -> bool:
        return self._called


def reach_taps(model: nn.Module) -> dict[str, Reached]:
    """A tap for each module, by name."""
    return {name: Reached() for name, _ in model.named_modules() if name}


def never_ran(model: nn.Module, taps: Mapping[str, Reached]) -> frozenset[str]:
    """Names of the modules that had no part in the pass: the tower of images where windows hold text alone.

    A module has a part where it was called, or its parent, which may use its weight without calling it, or anything of
    its block. It takes a block that never ran to say so of any module: a model may call none but its blocks.
    """
    modules = dict(model.named_modules())
    called = {name for name, tap in taps.items() if tap.result()}
    busy = called | {block for name in called if (block := block_of(modules, name))}
    if find_blocks(model).keys() <= busy:
        return frozenset()
    return frozenset(
        name
        for name in taps
        if name not in busy and name.rpartition(".")[0] not in called and block_of(modules, name) not in busy
    )
