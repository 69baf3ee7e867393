"""Temporary folders that do not outlive the process, even one that is killed."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

from invarlock.core.locks import try_lock, unlock

PREFIX = "invarlock-snapshot-"


class TemporaryFolder:
    """A folder that goes with the last object that holds it; ``TMPDIR`` says where.

    It is locked, so that ``sweep`` can tell it from one whose process was killed.
    """

    def __init__(self) -> None:
        self.path, handle = _new_folder()
        _live.append(weakref.finalize(self, _remove, self.path, handle))


_live: list[weakref.finalize[..., TemporaryFolder]] = []


def remove_all() -> None:
    """Remove the folders of this process, for one that ends without its interpreter's last steps."""
    for finalizer in _live:
        finalizer()


def sweep() -> None:
    """Remove the folders of processes that were killed; those of live processes and of other users stay."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            if (handle := _lock(path)) is not None:
                _remove(path, handle)


def _new_folder() -> tuple[Path, int | None]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        try:
            handle = _lock(path)
        except FileNotFoundError:
            continue  # Another process swept it before it was locked.
        except OSError:
            return path, None  # Nobody can lock here, so nobody sweeps either.
        if handle is not None and path.exists():
            return path, handle


def _lock(path: Path) -> int | None:
    """The handle of a folder of this user, or None if somebody else holds it.

    :raises OSError: it is gone, no folder, or cannot be locked.
    """
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(handle).st_uid == os.getuid() and try_lock(handle):
            return handle
    except OSError:
        os.close(handle)
        raise
    os.close(handle)
    return None


def _remove(path: Path, handle: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)
    if handle is not None:
        unlock(handle)
