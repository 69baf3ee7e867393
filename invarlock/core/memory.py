"""Memory of the machine, or of the container that a process is in."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
"""Folder of the files that limit a container's memory."""


def free_memory() -> int:
    """Bytes that a process can still take: of the machine, or of its container if that has less."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used) + _files_that_were_read()))


def _files_that_were_read() -> int:
    """Bytes that a container counts as used, and gives back as soon as they are needed."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split() for line in lines).get("inactive_file", 0))
