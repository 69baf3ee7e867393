"""An output folder belongs to one run at a time."""

from __future__ import annotations

import datetime
import logging
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from invarlock.core.errors import UsageError, one_line
from invarlock.core.locks import try_lock, unlock

LOCK = ".invarlock.lock"

log = logging.getLogger("invarlock")


@dataclass
class Claim:
    """A folder that is locked by a file in it. The lock ends with the process; the file may stay, and means nothing."""

    folder: Path
    made: list[Path] = field(default_factory=list)
    """Folders that were made for it, the innermost first; those that are empty in the end go."""
    handle: int | None = None
    """Of the locked file; None while the folder is not held."""

    def take(self) -> None:
        """Make the folder if it is missing, and lock it.

        :raises UsageError: another run holds it.
        :raises OSError: it cannot be written to.
        """
        while self.handle is None:
            self.made += make_folder(self.folder)
            self.handle = _locked(self.folder / LOCK)
        os.ftruncate(self.handle, 0)
        os.write(self.handle, _myself().encode())

    def release(self) -> None:
        if self.handle is None:
            return
        with suppress(OSError):
            # While it is locked: whoever opened it already finds another file in its place, or none.
            (self.folder / LOCK).unlink()
        unlock(self.handle)
        self.handle = None
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _locked(path: Path) -> int | None:
    """The handle of a file that this process alone has locked, or None if the file was removed meanwhile."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:
        return None
    try:
        ours = try_lock(handle)
    except OSError as error:
        log.warning(
            "output.dir: %s: the file system has no locks (%s); keep other runs out of it", path.parent, one_line(error)
        )
        return handle
    if not ours:
        owner = _owner(handle)
        os.close(handle)
        raise UsageError(f"output.dir: another run ({owner}) is writing to {path.parent}; choose another folder")
    if _is_at(path, handle):
        return handle
    unlock(handle)
    return None


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.lstat())
    except FileNotFoundError:
        return False


def _myself() -> str:
    now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return f"pid {os.getpid()} on {socket.gethostname()}, since {now}"


def _owner(handle: int) -> str:
    text = os.read(handle, 200).decode(errors="replace")
    return "".join(filter(str.isprintable, text)) or "just started"
