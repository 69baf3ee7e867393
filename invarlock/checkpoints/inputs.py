"""The files of a checkpoint as they were before a run: it only reads them, and tells when somebody else did not."""

from __future__ import annotations

from pathlib import Path

Files = dict[str, tuple[int, int]]
"""Size in bytes and time of the last change in nanoseconds, by path below the folder."""


class InputFiles:
    """A folder, or a single file, at one moment."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint, self._files = checkpoint, _files(checkpoint)

    def changes(self) -> list[str]:
        """A phrase for each file that appeared, vanished, or has another size or time by now."""
        before, now = self._files, _files(self._checkpoint)
        return [
            f"{name} {'appeared' if name not in before else 'is gone' if name not in now else 'changed'}"
            for name in sorted(now.keys() | before.keys())
            if now.get(name) != before.get(name)
        ]


def _files(checkpoint: Path) -> Files:
    folder, paths = checkpoint.parent, iter([checkpoint])
    if checkpoint.is_dir():
        folder, paths = checkpoint, checkpoint.rglob("*")
    # Of a link itself, too: what it points to may lie anywhere.
    stats = {path: path.lstat() for path in paths if path.is_symlink() or path.is_file()}
    return {path.relative_to(folder).as_posix(): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
