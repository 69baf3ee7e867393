"""A model whose weights stay on disk: each is read when an operation needs it, and let go when that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from invarlock.checkpoints.lazy import LazyTensor, LazyWeights, tied
from invarlock.checkpoints.reading import Checkpoint
from invarlock.core.errors import UsageError

Edit = Callable[[str, Tensor], Tensor]
"""What is made of a weight as it is read, given the name that it is stored under; it may work in place."""


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
        parameters: dict[str, LazyTensor] = {}
        for names, empty in tied(model):
            parameters |= dict.fromkeys(names, self._place(names, empty))
        for name, buffer in model.named_buffers():
            if name in checkpoint.entries:
                buffer.copy_(checkpoint[name])
        buffers = {name: buffer.to(device, copy=True) for name, buffer in model.named_buffers()}
        self._weights = LazyWeights(parameters, buffers)
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
        return self._weights.put_back(model)

    def _place(self, names: Sequence[str], empty: Tensor) -> LazyTensor:
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

        def read() -> Tensor:
            weight = self.read(stored)
            return weight if self.edit is None else self.edit(stored, weight)

        return LazyTensor(tuple(empty.shape), empty.dtype, self.device, read)


def attach(model: nn.Module, checkpoint: Checkpoint, *, device: torch.device | str = "cpu") -> None:
    """Put the weights of a checkpoint in the place of a model's empty ones, as they are on disk; ties stay tied.

    The model gets an attribute ``streaming``, a :class:`Streaming`.

    :param model: its parameters are on ``meta``, of the types that they shall have; its buffers are real.
    :param device: where operations on them take place.
    :raises UsageError: the checkpoint lacks a weight, under the name that the model has for it, or its shape differs,
        or it stores tied weights with different values.
    """
    model.streaming = Streaming(model, checkpoint, torch.device(device))  # type: ignore[assignment]


def streaming_of(model: nn.Module) -> Streaming | None:
    """Where a model's weights are read from, if they are on disk."""
    streaming = getattr(model, "streaming", None)
    return streaming if isinstance(streaming, Streaming) else None
