"""The checkpoints of a run: sound before they are loaded, and unchanged afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from invarlock.checkpoints.checksums import check_weights
from invarlock.core.progress import showing
from invarlock.core.results import Action, Finding
from invarlock.distributed.process_group import Ranks
from invarlock.pipeline.clock import Clock
from invarlock.pipeline.keeping import some

Files = dict[str, tuple[int, int]]
"""Size in bytes and time of the last change in nanoseconds, by path below the folder."""


@dataclass
class Inputs:
    """The checkpoints that were loaded, as they were before."""

    ranks: Ranks
    clock: Clock
    _before: dict[Path, Files] = field(default_factory=dict)

    def take_note_of(self, checkpoint: Path) -> None:
        """Hold the files of a checkpoint against digests that lie beside them; processes share the files.

        :raises UsageError: a file is not what its digest says.
        """
        if not checkpoint.exists() or checkpoint in self._before:
            return
        self._before[checkpoint] = _files(checkpoint)
        with self.clock.stage("check digests") as shown, showing(self.ranks.summed(shown)):
            check_weights(checkpoint, self.ranks.rank, self.ranks.size)
            self.ranks.gather(None)

    def changes(self) -> list[Finding]:
        """A warning for each checkpoint whose files are not what they were before it was loaded."""
        changed = ((checkpoint, _changes(before, _files(checkpoint))) for checkpoint, before in self._before.items())
        return [
            Finding("input checkpoint", Action.WARN, f"{checkpoint} was changed during the run: {some(changes)}")
            for checkpoint, changes in changed
            if changes
        ]


def _files(checkpoint: Path) -> Files:
    folder, paths = checkpoint.parent, iter([checkpoint])
    if checkpoint.is_dir():
        folder, paths = checkpoint, checkpoint.rglob("*")
    # Of a link itself, too: what it points to may lie anywhere.
    stats = {path: path.lstat() for path in paths if path.is_symlink() or path.is_file()}
    return {path.relative_to(folder).as_posix(): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def _changes(before: Files, now: Files) -> list[str]:
    """A phrase for each file that appeared, vanished, or has another size or time by now."""
    return [
        f"{name} {'appeared' if name not in before else 'is gone' if name not in now else 'changed'}"
        for name in sorted(now.keys() | before.keys())
        if now.get(name) != before.get(name)
    ]
