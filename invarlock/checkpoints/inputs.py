"""The files of a checkpoint as they were before a run: it only reads them, and tells when somebody else did not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, tuple[int, int]]
"""Size in bytes and time of the last change in nanoseconds, by path below the folder."""


@dataclass(frozen=True)
class InputFiles:
    """A folder, or a single file, at one moment."""

    checkpoint: Path
    files: Files

    @classmethod
    def of(cls, checkpoint: Path) -> InputFiles:
        return cls(checkpoint, dict(_files(checkpoint)))

    def changes(self) -> list[str]:
        """A phrase for each file that appeared, vanished, or has another size or time by now."""
        now = dict(_files(self.checkpoint))
        return [
            f"{name} {'appeared' if name not in self.files else 'is gone' if name not in now else 'changed'}"
            for name in sorted(now.keys() | self.files.keys())
            if now.get(name) != self.files.get(name)
        ]


def _files(checkpoint: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    paths = checkpoint.rglob("*") if checkpoint.is_dir() else [checkpoint]
    for path in paths:
        if path.is_symlink() or path.is_file():
            # Of a link itself, too: what it points to may lie anywhere.
            stat = path.lstat()
            name = path.name if path == checkpoint else path.relative_to(checkpoint).as_posix()
            yield name, (stat.st_size, stat.st_mtime_ns)
