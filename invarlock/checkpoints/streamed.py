"""A model whose weights stay on disk: each is read when an operation needs it, and let go when that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from invarlock.checkpoints.reading import Checkpoint
from invarlock.core.errors import UsageError

Edit = Callable[[str, Tensor], Tensor]
"""What is made of a weight as it is read, given the name of the parameter; it must not change what it is given."""


class StreamedTensor(torch.Tensor):
    """A weight on disk, with its shape, type and device at hand.

    Any operation on it reads it anew; none may change it.
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
        if func._schema.is_mutable:
            written = [entry for entry, place in zip(args, func._schema.arguments, strict=False) if place.is_write]
            if any(isinstance(entry, StreamedTensor) for entry in written):
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


class Streaming(Mapping[str, Tensor]):
    """A checkpoint and what is made of its weights: nothing for the baseline, the edit for the edited model.

    As a mapping it is the unedited parameters, by every name that the model has for each.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None) -> None:
        self.checkpoint = checkpoint
        self.device, self.dtype = device, dtype
        self.edit: Edit | None = None
        self.stored: dict[str, str] = {}
        """Under which name each parameter is stored, by every name that the model has for it."""

    def __getitem__(self, name: str) -> Tensor:
        return self.read(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def parameter(self, name: str, stored: str) -> StreamedTensor:
        """The parameter of a name, stored under another one if it is tied to that."""
        entry = self.checkpoint.entries[stored]

        def read() -> Tensor:
            weight = self.read(stored)
            return weight if self.edit is None else self.edit(name, weight)

        return StreamedTensor(entry.shape, self._kind(entry.dtype), self.device, read)

    def read(self, stored: str) -> Tensor:
        """A tensor of the checkpoint, as the unedited model has it."""
        tensor = self.checkpoint[stored]
        return tensor.to(self.device, self._kind(tensor.dtype))

    def _kind(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if self.dtype is not None and dtype.is_floating_point else dtype


def attach(
    model: nn.Module, checkpoint: Checkpoint, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> None:
    """Put the weights of a checkpoint in the place of a model's empty ones, as they are on disk; ties stay tied.

    The model gets an attribute ``streaming``, a :class:`Streaming`.

    :param device: where operations on them take place.
    :param dtype: what floating-point weights are read as; None leaves each as it is stored.
    :raises UsageError: the checkpoint lacks a weight, under the name that the model has for it, or its shape differs.
    """
    streaming = Streaming(checkpoint, torch.device(device), dtype)
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    streamed: dict[str, StreamedTensor] = {}
    for name, parameter in model.named_parameters():
        names = aliases[id(parameter)]
        stored = next((alias for alias in names if alias in checkpoint.entries), None)
        if stored is None:
            raise UsageError(f"model.id: {checkpoint.folder}: cannot be streamed, it has no tensor {name}")
        if checkpoint.entries[stored].shape != tuple(parameter.shape):
            shapes = f"{checkpoint.entries[stored].shape}, and the configuration says {tuple(parameter.shape)}"
            raise UsageError(f"model.id: {checkpoint.folder}: {stored} has shape {shapes}")
        streamed |= dict.fromkeys(names, streaming.parameter(name, stored))
        streaming.stored |= dict.fromkeys(names, stored)
    for name, tensor in streamed.items():
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._parameters[key] = tensor  # type: ignore[assignment]
    for name, buffer in model.named_buffers():
        if name in checkpoint.entries:
            buffer.copy_(checkpoint[name])
    model.streaming = streaming  # type: ignore[assignment]


def streaming_of(model: nn.Module) -> Streaming | None:
    """Where a model's weights are read from, if they are on disk."""
    streaming = getattr(model, "streaming", None)
    return streaming if isinstance(streaming, Streaming) else None
