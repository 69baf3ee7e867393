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
from torch import Tensor, nn

from invarlock.checkpoints.soundness import INDEX, SINGLE, read_json
from invarlock.core.errors import InputError, one_line


@dataclass(frozen=True)
class Entry:
    """Place, shape and dtype of a stored tensor."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint(Mapping[str, Tensor]):
    """Tensors by name, read from disk when asked for: pages of the file itself, which the system may drop again.

    :raises InputError: the folder holds no sound checkpoint, or a file changed since it was opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _index(folder)
        self.files = sorted(set(index.values())) or [SINGLE]
        self._handles = {file: _opened(folder / file) for file in self.files}
        self._identities = {file: _identity(folder / file) for file in self.files}
        self.entries: dict[str, Entry] = {}
        for file, handle in self._handles.items():
            for name in handle.keys():  # noqa: SIM118 - it is no mapping
                if name in self.entries:
                    raise _broken(folder, f"tensor {name} is in both {self.entries[name].file} and {file}")
                tensor = self._read(file, name)
                self.entries[name] = Entry(file, tuple(tensor.shape), tensor.dtype)
        for name, file in index.items():
            if name not in self.entries or self.entries[name].file != file:
                raise _broken(folder, f"{INDEX} lists {name} in {file}, which does not hold it")

    def __getitem__(self, name: str) -> Tensor:
        return self._read(self.entries[name].file, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def nbytes_of(self, file: str) -> int:
        return sum(entry.nbytes for entry in self.entries.values() if entry.file == file)

    def current_identity(self) -> dict[str, list[int]]:
        """Size, time and inode of each file by its path, to tell whether they are the same ones later.

        :raises InputError: a file changed since it was opened.
        """
        for file in self.files:
            self._check_unchanged(file)
        return {str((self.folder / file).resolve()): identity for file, identity in self._identities.items()}

    def fingerprint(self, edit: Mapping[str, Any] | None = None) -> str:
        """A digest of the files as they are now, by path, size, time and inode, and of what is made of them."""
        described = {"files": self.current_identity(), "edit": edit}
        return xxhash.xxh3_128_hexdigest(json.dumps(described, sort_keys=True).encode())

    def names_in(self, file: str) -> list[str]:
        return [name for name, entry in self.entries.items() if entry.file == file]

    def _read(self, file: str, name: str) -> Tensor:
        self._check_unchanged(file)
        try:
            tensor: Tensor = self._handles[file].get_tensor(name)
        except SafetensorError as error:
            raise _broken(self.folder, f"{file}: {name}: {one_line(error)}") from error
        return tensor

    def _check_unchanged(self, file: str) -> None:
        try:
            now = _identity(self.folder / file)
        except OSError as error:
            raise _broken(self.folder, f"{file} disappeared while it was read") from error
        if now != self._identities[file]:
            raise _broken(self.folder, f"{file} changed while it was read")


def files_of(model: nn.Module) -> Mapping[str, Tensor]:
    """Tensors in the folder that transformers loaded a model from, by its own word; none if they cannot be read."""
    folder = getattr(model, "name_or_path", None)
    if not isinstance(folder, str) or not Path(folder).is_dir():
        return {}
    try:
        return Checkpoint(Path(folder))
    except InputError:
        return {}


def header_of(path: Path) -> dict[str, str]:
    """The text that the header of a file holds besides its tensors.

    :raises InputError: the file is broken.
    """
    return dict(_opened(path).metadata() or {})


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise _broken(path.parent, f"{path.name}: {one_line(error)}") from error
    except OSError as error:
        raise _broken(path.parent, f"{path.name} cannot be read: {error.strerror}") from error
    except RuntimeError as error:
        # Torch maps the file, and the system may refuse one that is larger than its memory.
        raise _broken(path.parent, f"{path.name} cannot be mapped, split it into shards: {one_line(error)}") from error


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


def _broken(folder: Path, what: str) -> InputError:
    return InputError(f"{folder}: {what}")
