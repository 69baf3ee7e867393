"""A checkpoint written shard by shard, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from invarlock.checkpoints.output_folder import JOURNALS, PARTIAL, write_text
from invarlock.checkpoints.soundness import INDEX, SINGLE
from invarlock.checkpoints.swapping import is_folder, remove
from invarlock.core.errors import UsageError


@dataclass
class ShardedOutput:
    """Shards in a folder that is none of a checkpoint yet, and beside it a journal entry for each that is whole.

    Only shards of the same identity are kept: the same input files, plan and format. Journals stay until whoever writes
    the rest of a run's output has done so.
    """

    output: Path
    """The folder that holds the shards and the journals meanwhile."""
    files: Sequence[str]
    """The names of all its shards."""
    identity: Mapping[str, Any]
    rank: int = 0
    """Of the process that writes; the first one makes room before the others come."""

    def __post_init__(self) -> None:
        self.folder, self.journals = self.output / PARTIAL, self.output / JOURNALS
        in_place = is_folder(self.folder) and is_folder(self.journals)
        if self.rank == 0 and not (in_place and any(map(self._entry, self.files))):
            self.discard()
        for folder in (self.folder, self.journals):
            folder.mkdir(parents=True, exist_ok=True)

    def notes(self, file: str) -> Any | None:
        """Notes kept with a shard, or None if it is not whole yet."""
        entry = self._entry(file)
        return None if entry is None else entry["notes"]

    def write(self, file: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Write a shard to the side, rename it into place, and enter it in the journal.

        :param notes: what JSON can hold.
        """
        staged = self.folder / f".{file}.partial"
        remove(staged)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged, metadata={"format": "pt"})
        # On the disk before the journal says so.
        with staged.open("rb") as written:
            os.fsync(written.fileno())
        entry = {
            "identity": self.identity,
            "size": staged.stat().st_size,
            "tensors": {name: tensor.nbytes for name, tensor in tensors.items()},
            "notes": notes,
        }
        staged.replace(self.folder / file)
        write_text(self.journals / f"{file}.json", json.dumps(entry))

    @contextmanager
    def completed(self, target: Path) -> Iterator[Path]:
        """The folder, to be given what it lacks yet; then it becomes ``target``. If that fails, the shards stay.

        :raises UsageError: shards are missing.
        """
        entries = {file: entry for file in self.files if (entry := self._entry(file))}
        if missing := [file for file in self.files if file not in entries]:
            raise UsageError(
                f"output.dir: {self.folder} lacks {missing[0]}, which another process wrote somewhere else; give all "
                "processes one output folder that they share"
            )
        for stray in self.folder.iterdir():
            if stray.name not in self.files:
                remove(stray)
        if list(self.files) != [SINGLE]:
            self._write_index(entries)
        yield self.folder
        self.folder.rename(target)

    def discard(self) -> None:
        for folder in (self.folder, self.journals):
            remove(folder)

    def _write_index(self, entries: Mapping[str, Mapping[str, Any]]) -> None:
        weight_map = {name: file for file, entry in entries.items() for name in entry["tensors"]}
        total = sum(size for entry in entries.values() for size in entry["tensors"].values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _entry(self, file: str) -> dict[str, Any] | None:
        """Journal entry of a shard that is whole and of this identity, or None."""
        shard = self.folder / file
        try:
            entry: dict[str, Any] = json.loads((self.journals / f"{file}.json").read_text(encoding="utf-8"))
            whole = shard.is_file() and not shard.is_symlink() and shard.stat().st_size == entry["size"]
            return entry if whole and entry["identity"] == self.identity else None
        except (OSError, ValueError, LookupError, TypeError):
            return None
