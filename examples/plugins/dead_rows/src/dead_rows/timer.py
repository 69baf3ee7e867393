"""A wrapper around every guard, of whichever plugin: how long it took, in the report."""

import time

from invarlock import hookimpl

_seconds = {}


@hookimpl(wrapper=True)
def invarlock_validate(guard):
    started = time.perf_counter()
    try:
        return (yield)
    finally:
        _seconds[guard] = _seconds.get(guard, 0.0) + time.perf_counter() - started


@hookimpl
def invarlock_run_finished(report):
    report["extra"]["guard_timer"] = {
        "seconds": dict(_seconds),
        "slowest": max(_seconds, key=_seconds.get, default=None),
    }
    _seconds.clear()
