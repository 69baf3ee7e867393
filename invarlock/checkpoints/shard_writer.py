"""A checkpoint written shard by shard, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """Shards in a folder that is none of a checkpoint yet, with a journal of those that are whole.

    Only what has the same identity is gone on with: the same input files, plan and format. Journals stay until whoever
    writes the rest of a run's output has done so.
    """

    output: Path
    """The folder that holds the shards and the journals meanwhile."""
    files: Sequence[str]
    """The names of all its shards."""
    identity: Mapping[str, Any]
    rank: int = 0
    """Of the process that writes: each has a journal of its own, and all read those of all."""
    _done: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    _own: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.folder, self.journals = self.output / PARTIAL, self.output / JOURNALS
        self._done = self._kept()
        if self.rank == 0 and not (self._done and is_folder(self.folder) and is_folder(self.journals)):
            self.discard()
        for folder in (self.folder, self.journals):
            folder.mkdir(parents=True, exist_ok=True)
        own = self.journals / f"{self.rank}.json"
        self._own = json.loads(own.read_text(encoding="utf-8"))["shards"] if own.is_file() else {}

    def notes(self, file: str) -> Any | None:
        """Notes kept with a shard, or None if it is not whole yet."""
        return self._done[file]["notes"] if self._is_whole(file, self._done) else None

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
        size = staged.stat().st_size
        staged.replace(self.folder / file)
        names = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._own[file] = {"size": size, "tensors": names, "notes": notes}
        journal = json.dumps({"identity": self.identity, "shards": self._own})
        write_text(self.journals / f"{self.rank}.json", journal)

    @contextmanager
    def completed(self, target: Path) -> Iterator[Path]:
        """The folder, to be given what it lacks yet; then it becomes ``target``. If that fails, the shards stay.

        :raises UsageError: shards are missing.
        """
        done = self._kept()
        if missing := [file for file in self.files if not self._is_whole(file, done)]:
            raise UsageError(
                f"output.dir: {self.folder} lacks {missing[0]}, which another process wrote somewhere else; give all "
                "processes one output folder that they share"
            )
        for stray in self.folder.iterdir():
            if stray.name not in self.files:
                remove(stray)
        if list(self.files) != [SINGLE]:
            self._write_index(done)
        yield self.folder
        self.folder.rename(target)

    def discard(self) -> None:
        for folder in (self.folder, self.journals):
            remove(folder)

    def _write_index(self, done: Mapping[str, dict[str, Any]]) -> None:
        weight_map = {name: file for file, entry in done.items() for name in entry["tensors"]}
        total = sum(size for entry in done.values() for size in entry["tensors"].values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _is_whole(self, file: str, done: Mapping[str, dict[str, Any]]) -> bool:
        path = self.folder / file
        return file in done and path.is_file() and not path.is_symlink() and path.stat().st_size == done[file]["size"]

    def _kept(self) -> dict[str, dict[str, Any]]:
        """Shards that the journals list as whole, if all can be read and are of this identity."""
        try:
            journals = [json.loads(path.read_text(encoding="utf-8")) for path in self.journals.glob("[0-9]*.json")]
            if any(journal["identity"] != self.identity for journal in journals):
                return {}
            return {file: entry for journal in journals for file, entry in journal["shards"].items()}
        except (ValueError, LookupError, TypeError, AttributeError):
            return {}
