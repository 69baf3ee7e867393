"""A model whose weights stay on disk: each is read when an operation needs it, and let go when that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from invarlock.checkpoints.reading import Checkpoint
from invarlock.core.errors import UsageError

Edit = Callable[[str, Tensor], Tensor]
"""What is made of a weight as it is read, given the name that it is stored under; it may work in place."""


class StreamedTensor(torch.Tensor):
    """A weight on disk, with its shape, type and device at hand.

    Any operation on it reads it anew, into memory of its own: what is done to that, or to a view of it, is lost. An
    operation that would change the weight itself fails.
    """

    _read: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, read: Callable[[], Tensor]
    ) -> StreamedTensor:
        made: StreamedTensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._read = read
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
        args, kwargs = tree_map_only(StreamedTensor, StreamedTensor.whole, (args, kwargs or {}))
        return func(*args, **kwargs)

    def whole(self) -> Tensor:
        """The weight in memory."""
        return self._read()

    def data_ptr(self) -> int:
        """0: it has no address."""
        return 0

    def numpy(self, *, force: bool = False) -> Any:
        return self.whole().numpy(force=force)

    def tolist(self) -> Any:
        return self.whole().tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StreamedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def _written(arguments: Sequence[Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[bool]:
    """For each tensor that an operation writes to, whether it is streamed."""
    given = {place.name: value for place, value in zip(arguments, args, strict=False)} | dict(kwargs)
    for place in arguments:
        if place.is_write:
            yield from (isinstance(entry, StreamedTensor) for entry in tree_leaves(given.get(place.name)))


class Streaming(Mapping[str, Tensor]):
    """A checkpoint and what is made of its weights: nothing for the baseline, the edit for the edited model.

    As a mapping it is the unedited parameters, by every name that the model has for each.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.edit: Edit | None = None
        self.stored: dict[str, str] = {}
        """Under which name each parameter is stored, by every name that the model has for it."""
        self.left_out: set[str] = set()
        """Tensors of the checkpoint that are a tied parameter once more."""
        self._dtypes: dict[str, torch.dtype] = {}
        self._parameters: dict[str, StreamedTensor] = {}
        for names, empty in _tied(model):
            self._place(names, empty)
        for name, buffer in model.named_buffers():
            if name in checkpoint.entries:
                buffer.copy_(checkpoint[name])
        self._buffers = {name: buffer.to(device, copy=True) for name, buffer in model.named_buffers()}
        self.undo(model)

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def read(self, stored: str) -> Tensor:
        """A tensor of the checkpoint as the unedited model has it, in memory of its own."""
        tensor = self.checkpoint[stored]
        return tensor.to(self.device, self._dtypes.get(stored, tensor.dtype), copy=True)

    def undo(self, model: nn.Module) -> list[str]:
        """Put back every parameter and buffer that is not the model's own any more; returns their names."""
        changed = []
        # model.half() and its like change the type that a tensor claims to have.
        for stored in {self.stored[name] for name, own in self._parameters.items() if own.dtype != self._type_of(name)}:
            self._parameters |= dict.fromkeys(
                (name for name in self if self.stored[name] == stored), self._on_disk(stored)
            )
        for name, own in self._parameters.items():
            path, _, key = name.rpartition(".")
            held: dict[str, Any] = model.get_submodule(path)._parameters
            if held.get(key) is not own:
                changed.append(name)
                held[key] = own
        for name, kept in self._buffers.items():
            path, _, key = name.rpartition(".")
            buffers = model.get_submodule(path)._buffers
            now = buffers.get(key)
            if now is None or now.device != kept.device or now.dtype != kept.dtype or not torch.equal(now, kept):
                changed.append(name)
                buffers[key] = kept.clone()
        return changed

    def _place(self, names: Sequence[str], empty: Tensor) -> None:
        """Take in a parameter, by all its names.

        :param empty: what stands for it yet, of the shape and type that it shall have.
        """
        folder, entries = self.checkpoint.folder, self.checkpoint.entries
        stored, *others = [name for name in names if name in entries] or [""]
        if not stored:
            raise UsageError(f"model.id: {folder}: cannot be streamed, it has no tensor {names[0]}")
        if entries[stored].shape != tuple(empty.shape):
            shapes = f"{entries[stored].shape}, and the configuration says {tuple(empty.shape)}"
            raise UsageError(f"model.id: {folder}: {stored} has shape {shapes}")
        for other in others:
            if not torch.equal(self.checkpoint[other], self.checkpoint[stored]):
                raise UsageError(f"model.id: {folder}: cannot be streamed, {other} and {stored} are tied, and differ")
        self.left_out |= set(others)
        self.stored |= dict.fromkeys(names, stored)
        self._dtypes[stored] = empty.dtype
        self._parameters |= dict.fromkeys(names, self._on_disk(stored))

    def _on_disk(self, stored: str) -> StreamedTensor:
        def read() -> Tensor:
            weight = self.read(stored)
            return weight if self.edit is None else self.edit(stored, weight)

        return StreamedTensor(self.checkpoint.entries[stored].shape, self._dtypes[stored], self.device, read)

    def _type_of(self, name: str) -> torch.dtype:
        return self._dtypes[self.stored[name]]


def attach(model: nn.Module, checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> None:
    """Put the weights of a checkpoint in the place of a model's empty ones, as they are on disk; ties stay tied.

    The model gets an attribute ``streaming``, a :class:`Streaming`.

    :param model: its parameters are on ``meta``, of the types that they shall have; its buffers are real.
    :param device: where operations on them take place.
    :raises UsageError: the checkpoint lacks a weight, under the name that the model has for it, or its shape differs,
        or it stores tied weights with different values.
    """
    model.streaming = Streaming(model, checkpoint, torch.device(device))  # type: ignore[assignment]


def _tied(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Every parameter with all its names."""
    names: dict[int, list[str]] = {}
    parameters = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return ((names[identity], parameter) for identity, parameter in parameters.items())


def streaming_of(model: nn.Module) -> Streaming | None:
    """Where a model's weights are read from, if they are on disk."""
    streaming = getattr(model, "streaming", None)
    return streaming if isinstance(streaming, Streaming) else None
