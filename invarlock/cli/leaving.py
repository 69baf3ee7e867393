"""The end of the process: with its status, though plugins may have left threads and processes running."""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import NoReturn

from invarlock.cli import streams


def now() -> float:
    """Seconds since the epoch, as the system counts them for processes."""
    return time.time()


def leave(code: int, started: float) -> NoReturn:
    """End the process; threads that are left end with it, and so do processes that it has started.

    :param started: when this command began: an older child is somebody else's, whose shell became this process.
    """
    _end_children(started)
    for stream in (streams.result(), sys.stdout, sys.stderr):
        stream.flush()
    if any(not thread.daemon and thread is not threading.current_thread() for thread in threading.enumerate()):
        # The interpreter would wait for them. Only here: start-up has no use for it.
        from invarlock.core import temporary

        temporary.remove_all()
        os._exit(code)
    sys.exit(code)


def _end_children(started: float) -> None:
    if "torch" not in sys.modules:
        # No model was loaded; and start-up counts milliseconds.
        return
    import psutil

    for child in psutil.Process().children(recursive=True):
        try:
            if child.create_time() >= started - 1 / os.sysconf("SC_CLK_TCK"):
                child.kill()
        except psutil.Error:
            continue
