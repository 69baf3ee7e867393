"""The end of the process: with its status, though plugins may have left threads and processes running."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from invarlock.cli import streams


def leave(code: int, started: float) -> NoReturn:
    """End the process; threads that are left end with it, and so do processes that it has started.

    After a run nothing that was registered with ``atexit`` is called: it could change the status, or never end.

    :param started: when this command began, in seconds since the epoch: an older child is somebody else's, whose shell
        became this process.
    """
    streams.flush()
    if "torch" not in sys.modules:
        # No model was loaded, and no hook of a run was called.
        sys.exit(code)
    from invarlock.core import temporary

    _end_children(started)
    temporary.remove_all()
    # Not by the interpreter's last steps: it would wait for threads, and run what plugins have left for then.
    os._exit(code)


def _end_children(started: float) -> None:
    # Only here: start-up counts milliseconds.
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if child.create_time() >= started - 1 / os.sysconf("SC_CLK_TCK"):
                child.kill()
        except psutil.Error:
            continue
