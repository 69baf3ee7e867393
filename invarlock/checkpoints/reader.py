"""A safetensors checkpoint in a folder, read tensor by tensor and never changed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from invarlock.checkpoints.soundness import INDEX, SINGLE, read_json
from invarlock.core.errors import UsageError, one_line


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name, read from disk when asked for: pages of the file itself, which the system may drop again.

    :raises UsageError: the folder holds no sound checkpoint, or a file changed since it was opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _index(folder)
        self.files = sorted(set(index.values())) or [SINGLE]
        self._shards = {file: _Shard.open(folder / file) for file in self.files}
        self.entries: dict[str, Entry] = {}
        for file, shard in self._shards.items():
            for name in shard.handle.keys():  # noqa: SIM118 - it is no mapping
                if name in self.entries:
                    raise _broken(folder, f"tensor {name} is in both {self.entries[name].file} and {file}")
                tensor = shard.read(name)
                self.entries[name] = Entry(file, tuple(tensor.shape), tensor.dtype)
        for name, file in index.items():
            if name not in self.entries or self.entries[name].file != file:
                raise _broken(folder, f"{INDEX} lists {name} in {file}, which does not hold it")

    def __getitem__(self, name: str) -> Tensor:
        return self._shards[self.entries[name].file].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def nbytes_of(self, file: str) -> int:
        return sum(entry.nbytes for entry in self.entries.values() if entry.file == file)

    def current_identity(self) -> dict[str, list[int]]:
        """Size, time and inode of each file by its path, to tell whether they are the same ones later.

        :raises UsageError: a file changed since it was opened.
        """
        for shard in self._shards.values():
            shard.check_unchanged()
        return {str(shard.path.resolve()): shard.identity for shard in self._shards.values()}

    def fingerprint(self, edit: Mapping[str, Any] | None = None) -> str:
        """A digest of the files as they are now, by path, size, time and inode, and of what is made of them."""
        described = {"files": self.current_identity(), "edit": edit}
        return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())

    def names_in(self, file: str) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.file == file]


@dataclass(frozen=True)
class _Shard:
    path: Path
    handle: Any
    identity: list[int]

    @classmethod
    def open(cls, path: Path) -> _Shard:
        try:
            return cls(path, safe_open(path, framework="pt"), _identity(path))
        except SafetensorError as error:
            raise _broken(path.parent, f"{path.name}: {one_line(error)}") from error
        except OSError as error:
            raise _broken(path.parent, f"{path.name} cannot be read: {error.strerror}") from error
        except RuntimeError as error:
            # Torch maps the file, and the system may refuse one that is larger than its memory.
            raise _broken(
                path.parent, f"{path.name} cannot be mapped, split it into shards: {one_line(error)}"
            ) from error

    def read(self, name: str) -> Tensor:
        self.check_unchanged()
        try:
            tensor: Tensor = self.handle.get_tensor(name)
        except SafetensorError as error:
            raise _broken(self.path.parent, f"{self.path.name}: {name}: {one_line(error)}") from error
        return tensor

    def check_unchanged(self) -> None:
        try:
            now = _identity(self.path)
        except OSError as error:
            raise _broken(self.path.parent, f"{self.path.name} disappeared while it was read") from error
        if now != self.identity:
            raise _broken(self.path.parent, f"{self.path.name} changed while it was read")


def _identity(path: Path) -> list[int]:
    """Size in bytes, time of the last change in nanoseconds, and inode of a file."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def _index(folder: Path) -> dict[str, str]:
    """The shard of each tensor, a file of the folder itself; empty where all tensors are in one file."""
    # Where there are both, transformers reads the single file.
    if (folder / SINGLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        raise _broken(folder, f"there is neither {SINGLE} nor {INDEX}")
    try:
        index = {str(name): str(file) for name, file in read_json(folder / INDEX)["weight_map"].items()}
    except (KeyError, AttributeError) as error:
        raise _broken(folder, f"{INDEX} has no weight_map: {one_line(error)}") from error
    for file in sorted(set(index.values())):
        if Path(file).name != file or file in ("", ".", ".."):
            raise _broken(folder, f"{INDEX} names {file}, which is not a file of this folder")
        if not (folder / file).is_file():
            raise _broken(folder, f"{INDEX} names {file}, which does not exist")
    return index


def _broken(folder: Path, what: str) -> UsageError:
    return UsageError(f"model.id: {folder}: {what}")
