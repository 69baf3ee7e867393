"""Copies of a model's tensors, to restore it bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from copy import copy
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from invarlock.core.lazy import ReadWeights
from invarlock.core.memory import free_memory
from invarlock.core.progress import counted
from invarlock.core.temporary import TemporaryFolder
from invarlock.distributed.dtensor import assembler, local
from invarlock.models.fingerprint import named_tensors, stored_tensors

CPU = torch.device("cpu")


class Snapshot:
    """Copies of a model's tensors, and references to its structure.

    Copies are in the memory of the CUDA device that a tensor is on, or of the machine, where that has room for them
    twice over. Elsewhere the files that the model came from stand for the tensors that they hold bit for bit, and the
    others are copied to a temporary folder, one file each; ``TMPDIR`` says where, and the folder goes with the object.
    Structure (which module and parameter hangs where, and
    so what is tied) is kept by reference: it costs nothing, and parts that were swapped out come back too. Of a model
    that is spread over processes each keeps its own part.

    :param stored: the tensors of the checkpoint by name, each read at its use.
    """

    def __init__(self, model: nn.Module, stored: Mapping[str, Tensor] | None = None) -> None:
        self._structure = Structure(model)
        tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}
        names: dict[int, list[str]] = {}
        for name, tensor in named_tensors(model):
            names.setdefault(id(tensor), []).append(name)
        places = {identity: place for place, identity in enumerate(tensors)}
        self._places = {name: places[id(tensor)] for name, tensor in stored_tensors(model)}
        self._tensors = list(tensors.values())
        self._copies = _copies_for([local(tensor) for tensor in self._tensors], stored)
        for tensor in self._each():
            self._copies.keep(names[id(tensor)], local(tensor.detach()))

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Restore the model bit for bit, ties included."""
        self._structure.restore()
        for place, tensor in enumerate(self._each()):
            saved, part = self._copies.read(place), local(tensor)
            if part.shape == saved.shape and part.dtype == saved.dtype:
                part.copy_(saved)
            else:
                tensor.data = saved.to(tensor.device)

    @torch.no_grad()
    def restore_only(self, names: Iterable[str]) -> None:
        """Restore some parameters bit for bit, by their names, of a model whose structure is what it was."""
        for place in {self._places[name] for name in names}:
            local(self._tensors[place]).copy_(self._copies.read(place))

    def parameters(self) -> ReadWeights:
        """Parameters and stored buffers as they were, by name, tied ones under each of theirs.

        Each is copied when it is asked for, to the device of the model's own.

        Weights that are spread over processes are gathered: all have to ask for the same.
        """
        # Not self, which would hold the model that was saved.
        copies, places = self._copies, self._places
        owners = [(assembler(tensor), tensor.device) for tensor in self._tensors]

        def put(name: str, read: Callable[[int], Tensor]) -> Tensor:
            assemble, device = owners[places[name]]
            return assemble(read(places[name]).to(device))

        return ReadWeights(places, partial(put, read=copies.read), partial(put, read=copies.lend))

    def _each(self) -> Iterator[Tensor]:
        return counted(self._tensors, lambda tensor: tensor.nbytes)


def has_room(needed: int, device: torch.device = CPU) -> bool:
    """True if a device's memory can hold so many bytes twice over: the copies, and as much again for the run."""
    return 2 * needed <= (torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory())


def _copies_for(tensors: Sequence[Tensor], stored: Mapping[str, Tensor] | None) -> _CopiesInMemory | _CopiesOnDisk:
    """A place with room for copies of some tensors."""
    needed: Counter[torch.device] = Counter()
    for tensor in tensors:
        needed[tensor.device if tensor.is_cuda else CPU] += tensor.nbytes
    # Memory of the machine that no process had yet takes ten times as long to fill as to copy to.
    roomy = {device for device, nbytes in needed.items() if device != CPU and has_room(nbytes, device)}
    elsewhere = sum(nbytes for device, nbytes in needed.items() if device not in roomy)
    return _CopiesInMemory(roomy) if has_room(elsewhere) else _CopiesOnDisk(stored)


class _CopiesInMemory:
    """Tensors kept on their own device, where that is one of those given, or on the host."""

    def __init__(self, devices: Set[torch.device]) -> None:
        self._kept: list[Tensor] = []
        self._devices = devices

    def keep(self, names: Sequence[str], tensor: Tensor) -> None:
        device = tensor.device if tensor.device in self._devices else CPU
        self._kept.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=device).copy_(tensor))

    def read(self, place: int) -> Tensor:
        # A copy: whoever reads it may change it.
        return self._kept[place].clone()

    def lend(self, place: int) -> Tensor:
        return self._kept[place]


class _CopiesOnDisk:
    """Tensors in the checkpoint that they came from, or kept in a folder, which is removed with this object.

    A checkpoint refuses a file that has changed, and whoever restores a model compares its fingerprint afterwards.
    """

    def __init__(self, stored: Mapping[str, Tensor] | None) -> None:
        self._folder, self._stored = TemporaryFolder(), stored or {}
        self._names: list[str | None] = []
        """Of the tensors in the checkpoint; None for a copy."""

    def keep(self, names: Sequence[str], tensor: Tensor) -> None:
        tensor = tensor.cpu()
        held = (name for name in names if name in self._stored and _same_bits(self._stored[name], tensor))
        self._names.append(next(held, None))
        if self._names[-1] is None:
            save_file({"tensor": tensor.contiguous()}, self._file(len(self._names) - 1))

    def read(self, place: int) -> Tensor:
        # A clone, because pages of the checkpoint must not be written to.
        return self.lend(place) if self._names[place] is None else self.lend(place).clone()

    def lend(self, place: int) -> Tensor:
        name = self._names[place]
        return load_file(self._file(place))["tensor"] if name is None else self._stored[name]

    def _file(self, place: int) -> Path:
        return self._folder.path / f"{place}.safetensors"


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    # NaN is not equal to itself, and -0.0 is to 0.0.
    return torch.equal(*(each.contiguous().reshape(-1).view(torch.uint8) for each in (one, other)))


class Structure:
    """Parameters, buffers, submodules and mode of every module of a model, by reference."""

    def __init__(self, model: nn.Module) -> None:
        self._kept = [
            (module, {name: copy(vars(module)[name]) for name in ("training", "_parameters", "_buffers", "_modules")})
            for module in model.modules()
        ]

    def restore(self) -> None:
        for module, kept in self._kept:
            vars(module).update({name: copy(value) for name, value in kept.items()})
