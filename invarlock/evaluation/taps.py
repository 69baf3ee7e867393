"""Taps: what guards see of a module's inputs and outputs while windows pass through the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn

from invarlock.core.errors import PluginError, nearest


class Tap(Protocol):
    """Looks at one module, call by call, and keeps what it needs: sums rather than tensors."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take note of one call of the module; what is returned is ignored, and nothing may be changed."""

    def result(self) -> Any:
        """What was collected, once the pass is over."""


@contextmanager
def attached(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Let taps look at modules; they are off again afterwards, whatever happens.

    :param taps: by module name, as in ``model.named_modules()``.
    :raises PluginError: the model has no module of that name.
    """
    modules = dict(model.named_modules())
    for name in taps:
        if name not in modules:
            raise PluginError(f"{type(model).__name__} has no module {name!r} to tap{nearest(name, modules)}")
    handles = [modules[name].register_forward_hook(_hook(tap), with_kwargs=True) for name, tap in taps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(tap: Tap) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Returns None whatever the tap returns: torch would put anything else in the output's place.
        tap(module, args, kwargs, output)

    return hook
