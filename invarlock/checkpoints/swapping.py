"""A whole output takes the place of an earlier one: all of it or nothing, whenever the process is killed.

The new files are put into a staging folder beside the old ones. Then the old ones are moved there, into ``aside``. Once
all are, it is renamed to ``old``, and the new ones are moved out. Once all are, it is renamed to ``gone``. So the name
tells how to undo a swap that was cut off.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

PREFIX = ".invarlock-"
NEW, ASIDE, OLD, GONE = "new", "aside", "old", "gone"


def new_staging(folder: Path) -> Path:
    """An empty staging folder in ``folder``, with ``NEW`` in it."""
    staging = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=".partial", dir=folder))
    (staging / NEW).mkdir()
    return staging


def stagings(folder: Path) -> list[Path]:
    """Staging folders of this process, or of one that was killed."""
    return list(folder.glob(f"{PREFIX}*.partial"))


def swap(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Put what is new into ``folder``, and what goes by these names there out of it.

    If that fails or is interrupted, everything is where it was.
    """
    try:
        (staging / ASIDE).mkdir()
        _move(folder, staging / ASIDE, names)
        (staging / ASIDE).rename(staging / OLD)
        # Whoever waits for the first of them finds the others there.
        _move(staging / NEW, folder, names[::-1])
        (staging / OLD).rename(staging / GONE)
    except BaseException:
        undo(staging, folder, names)
        raise


def undo(staging: Path, folder: Path, names: Sequence[str]) -> None:
    """Undo a swap that was cut off; one that was completed, or had not begun, stays as it is."""
    if is_folder(staging / OLD):
        _move(folder, staging / NEW, names)
        (staging / OLD).rename(staging / ASIDE)
    if is_folder(staging / ASIDE):
        _move(staging / ASIDE, folder, names)


def is_swapped(staging: Path) -> bool:
    return is_folder(staging / GONE)


def is_folder(path: Path) -> bool:
    """A folder itself, and no link to one."""
    return path.is_dir() and not path.is_symlink()


def is_there(path: Path) -> bool:
    """Also a link that leads nowhere."""
    return path.is_symlink() or path.exists()


def remove(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it; what a link leads to stays."""
    if is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _move(source: Path, target: Path, names: Iterable[str]) -> None:
    for name in names:
        if is_there(source / name):
            (source / name).rename(target / name)
