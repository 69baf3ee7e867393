"""Weights that are not there until an operation needs them: each is read for it, and let go when that is done."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Read = Callable[[], Tensor]
"""Reads a weight into memory of its own."""


class LazyTensor(torch.Tensor):
    """A weight that is elsewhere, with its shape, type and device at hand.

    Any operation on it reads it anew, into memory of its own: what is done to that, or to a view of it, is lost. An
    operation that would change the weight itself fails.
    """

    _read: Read
    _type: torch.dtype

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, read: Read) -> LazyTensor:
        made: LazyTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._read, made._type = read, dtype
        # What isinstance(..., nn.Parameter) asks for.
        made._is_param = True
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            (of,) = args
            return cls(tuple(of.shape), of.dtype, of.device, of._read)
        if func._schema.is_mutable and any(_written(func._schema.arguments, args, kwargs or {})):
            raise RuntimeError(f"{func}: a streamed model is read only")
        args, kwargs = tree_map_only(LazyTensor, LazyTensor.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def whole(self) -> Tensor:
        """The weight in memory."""
        return self._read()

    def as_it_was(self) -> LazyTensor:
        """Itself, or one like it whose type is what it was: ``model.half()`` changes what a tensor claims to have."""
        return self if self.dtype == self._type else type(self)(tuple(self.shape), self._type, self.device, self._read)

    def data_ptr(self) -> int:
        """0: it has no address."""
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        return self.whole().numpy(force=force)

    def tolist(self) -> Any:
        return self.whole().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def _written(arguments: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[bool]:
    """For each tensor that an operation writes to, whether it is lazy."""
    given = {place.name: value for place, value in zip(arguments, args, strict=False)} | dict(kwargs)
    for place in arguments:
        if place.is_write:
            yield from (isinstance(entry, LazyTensor) for entry in tree_leaves(given.get(place.name)))


class ReadWeights(Mapping[str, Tensor]):
    """Weights by name, each read when it is asked for.

    :param lend: reads one that the caller will not write to; by default as any other.
    """

    def __init__(
        self, names: Collection[str], read: Callable[[str], Tensor], lend: Callable[[str], Tensor] | None = None
    ) -> None:
        self._names, self._read, self._lend = names, read, lend or read

    @property
    def lent(self) -> ReadWeights:
        """The same weights without a copy of each: nobody may write to them."""
        return ReadWeights(self._names, self._lend)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LazyWeights:
    """The lazy parameters and the real buffers of a model, by every name that it has for each."""

    def __init__(self, parameters: Mapping[str, LazyTensor], buffers: Mapping[str, Tensor]) -> None:
        self.parameters, self.buffers = dict(parameters), dict(buffers)

    def settle(self, model: nn.Module) -> None:
        """Let go of computed buffers that differ by now: the model's own code computes them anew while it runs."""
        for path, module in model.named_modules(remove_duplicate=False):
            for key in module._non_persistent_buffers_set:
                name = f"{path}.{key}" if path else key
                if name in self.buffers and not _same(module._buffers.get(key), self.buffers[name]):
                    del self.buffers[name]

    def put_back(self, model: nn.Module) -> list[str]:
        """Give the model back every parameter and buffer that is not its own any more; returns their names."""
        changed = []
        as_they_were = {id(own): own.as_it_was() for own in self.parameters.values()}
        self.parameters = {name: as_they_were[id(own)] for name, own in self.parameters.items()}
        for name, own in self.parameters.items():
            path, _, key = name.rpartition(".")
            held: dict[str, Any] = model.get_submodule(path)._parameters
            if held.get(key) is not own:
                changed.append(name)
                held[key] = own
        for name, kept in self.buffers.items():
            path, _, key = name.rpartition(".")
            buffers = model.get_submodule(path)._buffers
            if not _same(buffers.get(key), kept):
                changed.append(name)
                buffers[key] = kept.clone()
        return changed


def _same(now: Tensor | None, kept: Tensor) -> bool:
    return now is not None and now.device == kept.device and now.dtype == kept.dtype and torch.equal(now, kept)


def tied(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Every parameter with all its names."""
    found: dict[int, tuple[list[str], Tensor]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names, _ = found.setdefault(id(parameter), ([], parameter))
        names.append(name)
    return iter(found.values())
