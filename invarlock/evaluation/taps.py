"""Taps: access of guards to inputs and outputs of modules while windows pass through the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from invarlock.core.errors import PluginError, nearest
from invarlock.datasets.layout import Windows
from invarlock.distributed.dtensor import is_spread


class Tap(Protocol):
    """Observer of one module, call by call, that keeps what it needs: sums rather than tensors."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        """Take note of one call of the module; what is returned is ignored, and nothing may be changed."""

    def result(self) -> Any:
        """Return the collected result, once the pass is over."""


def ends_of(taps: Iterable[Mapping[str, Tap]], windows: Windows) -> list[tuple[int, Mapping[str, Tap]]]:
    """The taps of each guard that has any, with the number of the first windows that they look at.

    That is all, unless each tap of the guard has a number of ``positions`` that suffice: tokens of a target, where
    windows have one.
    """
    length = windows.labels.shape[1] or windows.length
    every = len(windows) * length
    wanted = ((max(getattr(tap, "positions", None) or every for tap in each.values()), each) for each in taps if each)
    return [(-(-min(positions, every) // length), of_guard) for positions, of_guard in wanted]


def first_windows(count: int, batch: Sequence[int], value: Any) -> Any:
    """The part of a module's inputs or outputs that belongs to the first windows; tensors of other shapes, as they are.

    :param batch: number of windows that pass together, and tokens per window.
    """
    windows, length = batch

    def cut(tensor: Tensor) -> Tensor:
        size = tensor.shape[0] if tensor.ndim else 0
        # Copies: a view would reach the windows that decide.
        if size == windows:
            return tensor[:count].clone()
        # Experts take all tokens of all windows in one row.
        return tensor[: count * length].clone() if size == windows * length else tensor

    return tree_map_only(Tensor, cut, value)


@contextmanager
def attached(
    model: nn.Module, taps: Mapping[str, Tap], part: Callable[[Any], Any] = lambda value: value
) -> Iterator[None]:
    """Let taps look at modules; they are off again afterwards, whatever happens.

    :param taps: by module name, as in ``model.named_modules()``.
    :param part: the part of a call's inputs and outputs to show them.
    :raises PluginError: the model has no module of that name.
    """
    modules = dict(model.named_modules())
    for name in taps:
        if name not in modules:
            raise PluginError(f"{type(model).__name__} has no module {name!r} to tap{nearest(name, modules)}")
    handles = [modules[name].register_forward_hook(_hook(tap, part), with_kwargs=True) for name, tap in taps.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(tap: Tap, part: Callable[[Any], Any]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Returns None whatever the tap returns: torch would put anything else in the output's place.
        args, output = _whole_features(module, args, output)
        tap(module, *part((args, kwargs, output)))

    return hook


def _whole_features(module: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[tuple[Any, ...], Any]:
    """Whole inputs and outputs of a linear layer, of which tensor parallelism leaves a process some features."""
    if not isinstance(module, nn.Linear) or not is_spread(module.weight):
        return args, output
    mesh = module.weight.device_mesh
    given = tuple(_gathered(value, module.in_features, mesh) for value in args)
    return given, _gathered(output, module.out_features, mesh)


def _gathered(value: Any, features: int, mesh: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape[-1] * mesh.size() != features:
        return value
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(value, mesh, [Shard(value.ndim - 1)]).full_tensor()
