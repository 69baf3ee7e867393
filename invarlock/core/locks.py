"""Locks that end with the process that holds them, however it ends."""

from __future__ import annotations

import fcntl
import os

_held: set[int] = set()


def try_lock(handle: int) -> bool:
    """Lock an open file or folder, unless somebody else has locked it.

    :raises OSError: the file system has no locks.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    _held.add(handle)
    return True


def unlock(handle: int) -> None:
    """Close what was locked."""
    _held.discard(handle)
    os.close(handle)


def _leave_to_parent() -> None:
    for handle in _held:
        os.close(handle)
    _held.clear()


# A child that outlives the process would keep its locks.
os.register_at_fork(after_in_child=_leave_to_parent)
