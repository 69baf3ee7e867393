"""A model whose weights stay on disk: each is read when an operation needs it, and let go when that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from invarlock.checkpoints.reader import Checkpoint
from invarlock.core.errors import InputError, NotStreamedError
from invarlock.core.lazy import LazyTensor, LazyWeights, ReadWeights, tied

WeightEdit = Callable[[str, Tensor], Tensor]
"""Function of the name of a parameter and its weight as read, which makes the edited weight; it may work in place."""


@dataclass(frozen=True)
class Part:
    """Tensors of a checkpoint, and the parameters or buffers of a model that they are: here one is one."""

    parameters: tuple[str, ...]
    stored: tuple[str, ...]
    converts: ClassVar[bool] = False
    """True if parameters are made of the tensors by more than a change of name."""

    def load(self, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """The parameters, by name, made of tensors that are read by the name that each is stored under."""
        return {self.parameters[0]: read(self.stored[0])}

    def store(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to store for the parameters, by name."""
        return {self.stored[0]: weights[self.parameters[0]]}


@dataclass
class _Kept:
    """Tensors as they were read, for they are read again and again: as many as a GPU has memory for."""

    room: int
    """Bytes that are left."""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def on(cls, device: torch.device) -> _Kept:
        """Half of what is free on a CUDA device, for activations need some; the system itself keeps files in memory."""
        return cls(torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0)

    def take(self, name: str, tensor: Tensor) -> None:
        if tensor.nbytes <= self.room:
            self.room -= tensor.nbytes
            self.tensors[name] = tensor.clone()


class Streaming:
    """A checkpoint and what is made of its weights: nothing for the baseline, the edit for the edited model."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, parts: Iterable[Part], device: torch.device) -> None:
        self.checkpoint, self.device = checkpoint, device
        self._kept = _Kept.on(device)
        self.edit: WeightEdit | None = None
        self._in_force: WeightEdit | None = None
        self.stored: dict[str, str] = {}
        """By which of its names each parameter is stored, by every name that the model has for it."""
        self.left_out: set[str] = set()
        """Tensors of the checkpoint that are a tied parameter once more."""
        self.parts = {name: part for part in parts for name in part.parameters}
        """The part of the checkpoint that each parameter is in, by the name in ``stored``."""
        self._holding = {stored: part for part in self.parts.values() for stored in part.stored}
        self._dtypes: dict[str, torch.dtype] = {}
        parameters: dict[str, LazyTensor] = {}
        for names, empty in tied(model):
            parameters |= dict.fromkeys(names, self._place(names, empty))
        for name, buffer in model.named_buffers():
            if name in self.parts:
                buffer.copy_(self._load(name))
        buffers = {name: buffer.to(device, copy=True) for name, buffer in model.named_buffers()}
        self._weights = LazyWeights(parameters, buffers)
        self.undo(model)

    def unedited(self) -> ReadWeights:
        """Parameters and buffers as they are stored, by every name that the model has for each."""
        buffers = {name: name for name in self._weights.buffers if name in self.parts}
        places = {**self.stored, **buffers}
        return ReadWeights(places, lambda name: self._load(places[name]))

    def read(self, stored: str) -> Tensor:
        """A tensor of the checkpoint in memory of its own, of the type that the unedited model has it in."""
        kept = self._kept.tensors.get(stored)
        if kept is not None:
            return kept.clone()
        tensor = self.checkpoint[stored]
        read = tensor.to(self.device, self._dtypes.get(stored, tensor.dtype), copy=True)
        self._kept.take(stored, read)
        return read

    def parts_in(self, file: str) -> list[Part]:
        """All that a shard holds, or holds some of, but for what is left out; what is no parameter, too."""
        names = [name for name in self.checkpoint.names_in(file) if name not in self.left_out]
        return list(dict.fromkeys(self._holding.get(name, Part((name,), (name,))) for name in names))

    def undo(self, model: nn.Module) -> list[str]:
        """Put back every parameter and buffer that is not the model's own any more, and the edit; returns names."""
        names = self._weights.put_back(model)
        if self.edit is not self._in_force:
            self.edit = self._in_force
            names.append("streaming.edit")
        return names

    def settle(self, model: nn.Module) -> None:
        """Take computed buffers that differ by now as the model's own doing: it ran, and nothing else did."""
        self._weights.settle(model)

    def put(self, edit: WeightEdit | None) -> None:
        """Let the model be edited by this from now on, or, given None, be the baseline again."""
        self.edit = self._in_force = edit

    def _load(self, parameter: str) -> Tensor:
        return self.parts[parameter].load(self.read)[parameter]

    def _place(self, names: Sequence[str], empty: Tensor) -> LazyTensor:
        """Take in a parameter, by all its names; ``empty`` has the shape and type that it shall have."""
        folder = self.checkpoint.folder
        parameter, *others = [name for name in names if name in self.parts] or [""]
        if not parameter:
            raise InputError(f"{folder}: cannot be streamed, it has no tensor {names[0]}")
        if (shape := self._shape(parameter)) != tuple(empty.shape):
            shapes = f"{shape}, but the configuration describes {tuple(empty.shape)}"
            raise InputError(f"{folder}: {parameter} has shape {shapes}")
        for other in others:
            if self.parts[other].converts or not torch.equal(self._load(other), self._load(parameter)):
                differ = f"{other} and {parameter} are tied, and differ"
                raise NotStreamedError(f"{folder}: cannot be streamed, {differ}")
            self.left_out |= set(self.parts[other].stored)
        self.stored |= dict.fromkeys(names, parameter)
        self._dtypes |= dict.fromkeys(self.parts[parameter].stored, empty.dtype)

        def read() -> Tensor:
            weight = self._load(parameter)
            return weight if self.edit is None else self.edit(parameter, weight)

        return LazyTensor(tuple(empty.shape), empty.dtype, self.device, read)

    def _shape(self, parameter: str) -> tuple[int, ...]:
        entries = self.checkpoint.entries
        made = self.parts[parameter].load(lambda name: torch.empty(entries[name].shape, device="meta"))
        return tuple(made[parameter].shape)


def attach(
    model: nn.Module, checkpoint: Checkpoint, parts: Iterable[Part], *, device: torch.device | str = "cpu"
) -> None:
    """Put the weights of a checkpoint in the place of a model's empty ones, as they are on disk; ties stay tied.

    The model gets an attribute ``streaming``, a :class:`Streaming`.

    :param model: its parameters are on ``meta``, of the types that they shall have; its buffers are real.
    :param parts: which tensors of the checkpoint are which of its parameters.
    :param device: where operations on them take place.
    :raises InputError: the checkpoint lacks a weight, or its shape differs, or it stores tied weights with different
        values.
    """
    model.streaming = Streaming(model, checkpoint, parts, torch.device(device))  # type: ignore[assignment]


def streaming_of(model: nn.Module) -> Streaming | None:
    """Source of a model's weights, if they are on disk; else None."""
    streaming = getattr(model, "streaming", None)
    return streaming if isinstance(streaming, Streaming) else None
