"""A model's tensors on disk, to restore it bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from invarlock.core.lazy import ReadWeights
from invarlock.core.progress import counted
from invarlock.core.temporary import TemporaryFolder
from invarlock.distributed.dtensor import assembler, local
from invarlock.models.fingerprint import named_tensors


class Snapshot:
    """The tensors of a model in a temporary folder, one safetensors file each, and references to its structure.

    On disk, so that a baseline does not double the memory of a run; ``TMPDIR`` says where. The folder goes with the
    object. Structure (which module and parameter hangs where, and so what is tied) is kept by reference: it costs
    nothing, and parts that were swapped out come back too. Of a model that is spread over processes each keeps its own
    part.
    """

    def __init__(self, model: nn.Module) -> None:
        self._folder = TemporaryFolder()
        self._structure = Structure(model)
        tensors = {id(tensor): tensor for _, tensor in named_tensors(model)}.values()
        self._files = [(f"{number}.safetensors", tensor) for number, tensor in enumerate(tensors)]
        self._names = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
        for file, tensor in counted(self._files, lambda entry: entry[1].nbytes):
            save_file({"tensor": local(tensor.detach()).cpu().contiguous()}, self._folder.path / file)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Restore the model bit for bit, ties included."""
        self._structure.restore()
        for file, tensor in counted(self._files, lambda entry: entry[1].nbytes):
            saved, part = load_file(self._folder.path / file)["tensor"], local(tensor)
            if part.shape == saved.shape and part.dtype == saved.dtype:
                part.copy_(saved)
            else:
                tensor.data = saved.to(tensor.device)

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters as they were, by name, tied ones under each of theirs; read from disk when asked for.

        Weights that are spread over processes are gathered then: all have to ask for the same.
        """
        # Not self, which would hold the model that was saved.
        folder, names = self._folder, self._names
        files = {id(tensor): (file, assembler(tensor)) for file, tensor in self._files}

        def read(name: str) -> Tensor:
            file, assemble = files[names[name]]
            return assemble(load_file(folder.path / file)["tensor"])

        return ReadWeights(names, read)


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
