"""Copies of a model's tensors, to restore it bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from itertools import count
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from invarlock.core.lazy import ReadWeights
from invarlock.core.memory import free_memory
from invarlock.core.progress import counted
from invarlock.core.temporary import TemporaryFolder
from invarlock.distributed.dtensor import assembler, local
from invarlock.models.fingerprint import named_tensors


class Snapshot:
    """Copies of a model's tensors, and references to its structure.

    Copies are in memory where that has room for them twice over, else in a temporary folder, one safetensors file
    each; ``TMPDIR`` says where, and the folder goes with the object. Structure (which module and parameter hangs where,
    and so what is tied) is kept by reference: it costs nothing, and parts that were swapped out come back too. Of a
    model that is spread over processes each keeps its own part.
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure = Structure(model)
        tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}
        places = {identity: place for place, identity in enumerate(tensors)}
        self._places = {name: places[id(tensor)] for name, tensor in model.named_parameters(remove_duplicate=False)}
        self._tensors = list(tensors.values())
        needed = sum(local(tensor).nbytes for tensor in self._tensors)
        self._copies: _InMemory | _OnDisk = _InMemory() if 2 * needed <= free_memory() else _OnDisk()
        for tensor in self._each():
            self._copies.keep(local(tensor.detach()))

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

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters as they were, by name, tied ones under each of theirs; copied when asked for.

        Weights that are spread over processes are gathered then: all have to ask for the same.
        """
        # Not self, which would hold the model that was saved.
        copies, places, assemblers = self._copies, self._places, [assembler(tensor) for tensor in self._tensors]
        return ReadWeights(places, lambda name: assemblers[places[name]](copies.read(places[name])))

    def _each(self) -> Iterator[Tensor]:
        return counted(self._tensors, lambda tensor: tensor.nbytes)


class _InMemory:
    """Tensors kept on the host."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def keep(self, tensor: Tensor) -> None:
        self._kept.append(torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor))

    def read(self, place: int) -> Tensor:
        # A copy: whoever reads it may change it.
        return self._kept[place].clone()


class _OnDisk:
    """Tensors kept in a folder, which is removed with this object."""

    def __init__(self) -> None:
        self._folder, self._count = TemporaryFolder(), count()

    def keep(self, tensor: Tensor) -> None:
        save_file({"tensor": tensor.cpu().contiguous()}, self._file(next(self._count)))

    def read(self, place: int) -> Tensor:
        return load_file(self._file(place))["tensor"]

    def _file(self, place: int) -> Path:
        return self._folder.path / f"{place}.safetensors"


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
