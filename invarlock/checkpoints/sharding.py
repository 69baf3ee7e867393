"""A checkpoint written shard by shard, so that a run that was cut off goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from invarlock.checkpoints.reading import INDEX, SINGLE
from invarlock.checkpoints.writing import write_text

JOURNAL = "journal-{}.json"


@dataclass
class ShardedOutput:
    """Shards in a folder that is none of a checkpoint yet, with a journal of those that are whole.

    Only what has the same identity is gone on with: the same input files, plan and format.
    """

    folder: Path
    identity: Mapping[str, Any]
    rank: int = 0
    """Of the process that writes: each has a journal of its own, and all read those of all."""
    _done: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    _own: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._done = self._kept()
        if not self._done and self.rank == 0 and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / JOURNAL.format(self.rank)
        self._own = json.loads(own.read_text(encoding="utf-8"))["shards"] if own.is_file() else {}

    def notes(self, file: str) -> Any | None:
        """What was noted with a shard, or None if it is not whole yet."""
        entry = self._done.get(file)
        there = entry is not None and (self.folder / file).is_file()
        return entry["notes"] if entry and there and (self.folder / file).stat().st_size == entry["size"] else None

    def write(self, file: str, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Write a shard to the side, rename it into place, and enter it in the journal.

        :param notes: what JSON can hold.
        """
        staged = self.folder / f".{file}.partial"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, staged, metadata={"format": "pt"})
        size = staged.stat().st_size
        staged.replace(self.folder / file)
        names = {name: tensor.nbytes for name, tensor in tensors.items()}
        self._own[file] = {"size": size, "tensors": names, "notes": notes}
        journal = json.dumps({"identity": self.identity, "shards": self._own})
        write_text(self.folder / JOURNAL.format(self.rank), journal)

    def finish(self) -> None:
        """Write the index, if there are several shards, and end the journals of all processes."""
        done = self._kept()
        if set(done) != {SINGLE}:
            weight_map = {name: file for file, entry in done.items() for name in entry["tensors"]}
            total = sum(size for entry in done.values() for size in entry["tensors"].values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        for journal in self.folder.glob(JOURNAL.format("*")):
            journal.unlink()

    def discard(self) -> None:
        shutil.rmtree(self.folder)

    def _kept(self) -> dict[str, dict[str, Any]]:
        """What the journals say is whole, if all are of this identity."""
        journals = [json.loads(path.read_text(encoding="utf-8")) for path in self.folder.glob(JOURNAL.format("*"))]
        if any(journal["identity"] != self.identity for journal in journals):
            return {}
        return {file: entry for journal in journals for file, entry in journal["shards"].items()}
