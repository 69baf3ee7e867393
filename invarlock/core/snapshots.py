"""A model's exact state: fingerprints to tell whether it changed, snapshots to bring it back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import load_file, save_file

from invarlock.core.progress import counted
from invarlock.core.spread import assembler, local, whole
from invarlock.core.temporary import TemporaryFolder


def named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer under each of its names; tied ones come once a name."""
    return itertools.chain(
        model.named_parameters(remove_duplicate=False),
        model.named_buffers(remove_duplicate=False),
    )


@dataclass(frozen=True)
class Fingerprint:
    """A 128-bit XXH3 digest of each tensor's dtype, shape and bytes, and which names are tied.

    It tells accidents apart, not forgeries: the hash is not cryptographic.
    """

    tensors: dict[str, str]
    computed: frozenset[str] = frozenset()
    """Buffers that no checkpoint stores: the model's own code computes them, and some do so anew while they run."""

    @classmethod
    def of(cls, model: torch.nn.Module, *, only_computed: bool = False) -> Fingerprint:
        """Fingerprint of all tensors of a model, or of its computed buffers alone."""
        computed = frozenset(_computed_buffers(model))
        digests: dict[str, str] = {}
        names_by_identity: dict[int, str] = {}
        tensors = [(name, tensor) for name, tensor in named_tensors(model) if not only_computed or name in computed]
        for name, tensor in counted(tensors, lambda named: named[1].nbytes):
            first = names_by_identity.setdefault(id(tensor), name)
            digests[name] = _digest(tensor) if first == name else f"tied to {first}"
        return cls(digests, computed)

    @property
    def digest(self) -> str:
        """One digest of all that a checkpoint stores."""
        stored = (f"{name} {value}" for name, value in self.tensors.items() if name not in self.computed)
        return xxhash.xxh3_128_hexdigest("\n".join(stored).encode())

    def changed_since(self, earlier: Fingerprint) -> list[str]:
        """Names of the tensors that differ, appeared or vanished."""
        names = self.tensors | earlier.tensors
        return [name for name in names if self.tensors.get(name) != earlier.tensors.get(name)]


def _computed_buffers(model: torch.nn.Module) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        yield from (f"{path}.{name}" if path else name for name in module._non_persistent_buffers_set)


def _digest(tensor: torch.Tensor) -> str:
    state = xxhash.xxh3_128(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.device.type != "meta":
        state.update(whole(tensor.detach()).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


class Snapshot:
    """The tensors of a model in a temporary folder, one safetensors file each, and references to its structure.

    On disk, so that a baseline does not double the memory of a run; ``TMPDIR`` says where. The folder goes with the
    object. Structure (which module and parameter hangs where, and so what is tied) is kept by reference: it costs
    nothing, and parts that were swapped out come back too. Of a model that is spread over processes each keeps its own
    part.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._folder = TemporaryFolder()
        self._structure = [Structure.of(module) for module in model.modules()]
        self._tensors = list({id(tensor): tensor for _, tensor in named_tensors(model)}.values())
        self._names = {name: id(tensor) for name, tensor in model.named_parameters(remove_duplicate=False)}
        for path, tensor in counted(list(self._files()), lambda file: file[1].nbytes):
            save_file({"tensor": local(tensor.detach()).cpu().contiguous()}, path)

    @torch.no_grad()
    def restore(self, model: torch.nn.Module) -> None:
        """Bring the model back bit for bit, ties included."""
        for structure in self._structure:
            structure.restore()
        for path, tensor in counted(list(self._files()), lambda file: file[1].nbytes):
            saved, part = load_file(path)["tensor"], local(tensor)
            if part.shape == saved.shape and part.dtype == saved.dtype:
                part.copy_(saved)
            else:
                tensor.data = saved.to(tensor.device)

    def parameters(self) -> Mapping[str, torch.Tensor]:
        """The parameters as they were, by name, tied ones under each of theirs; read from disk when asked for.

        Weights that are spread over processes are gathered then: all have to ask for the same.
        """
        files = {id(tensor): (path, assembler(tensor)) for path, tensor in self._files()}
        return _OnDisk(self._folder, {name: files[identity] for name, identity in self._names.items()})

    def _files(self) -> Iterator[tuple[Path, torch.Tensor]]:
        for number, tensor in enumerate(self._tensors):
            yield self._folder.path / f"{number}.safetensors", tensor


class _OnDisk(Mapping[str, torch.Tensor]):
    """Tensors by name, read when asked for. It holds the folder, but not the model that was saved there."""

    def __init__(
        self, folder: TemporaryFolder, files: Mapping[str, tuple[Path, Callable[[torch.Tensor], torch.Tensor]]]
    ) -> None:
        self._folder, self._files = folder, files

    def __getitem__(self, name: str) -> torch.Tensor:
        path, assemble = self._files[name]
        return assemble(load_file(path)["tensor"])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


@dataclass(frozen=True)
class Structure:
    """What hangs on one module."""

    module: torch.nn.Module
    training: bool
    parameters: dict[str, Any]
    buffers: dict[str, Any]
    modules: dict[str, Any]

    @classmethod
    def of(cls, module: torch.nn.Module) -> Structure:
        return cls(module, module.training, {**module._parameters}, {**module._buffers}, {**module._modules})

    def restore(self) -> None:
        self.module.training = self.training
        for live, kept in (
            (self.module._parameters, self.parameters),
            (self.module._buffers, self.buffers),
            (self.module._modules, self.modules),
        ):
            live.clear()
            live.update(kept)
