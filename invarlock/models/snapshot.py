"""A model's tensors on disk, to restore it bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

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
        self._files = [(self._folder.path / f"{number}.safetensors", tensor) for number, tensor in enumerate(tensors)]
        self._names = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
        for path, tensor in counted(self._files, lambda file: file[1].nbytes):
            save_file({"tensor": local(tensor.detach()).cpu().contiguous()}, path)

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Restore the model bit for bit, ties included."""
        self._structure.restore()
        for path, tensor in counted(self._files, lambda file: file[1].nbytes):
            saved, part = load_file(path)["tensor"], local(tensor)
            if part.shape == saved.shape and part.dtype == saved.dtype:
                part.copy_(saved)
            else:
                tensor.data = saved.to(tensor.device)

    def parameters(self) -> Mapping[str, Tensor]:
        """The parameters as they were, by name, tied ones under each of theirs; read from disk when asked for.

        Weights that are spread over processes are gathered then: all have to ask for the same.
        """
        files = {id(tensor): (path, assembler(tensor)) for path, tensor in self._files}
        return _OnDisk(self._folder, {name: files[identity] for name, identity in self._names.items()})


class _OnDisk(Mapping[str, Tensor]):
    """Tensors by name, read when asked for. It holds the folder, but not the model that was saved there."""

    def __init__(self, folder: TemporaryFolder, files: Mapping[str, tuple[Path, Callable[[Tensor], Tensor]]]) -> None:
        self._folder, self._files = folder, files

    def __getitem__(self, name: str) -> Tensor:
        path, assemble = self._files[name]
        return assemble(load_file(path)["tensor"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


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
