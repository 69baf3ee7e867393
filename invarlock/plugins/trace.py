"""``INVARLOCK_DEBUG_TRACE=1``: discovery and every hook call on stderr."""

from __future__ import annotations

import logging
import reprlib
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pluggy

from invarlock.plugins.plugin import Plugin

log = logging.getLogger("invarlock.trace")


def trace_discovery(plugins: Iterable[Plugin]) -> None:
    for plugin in plugins:
        log.debug(
            "plugin %s: %s, %s from %s %s: %s%s",
            plugin.name, plugin.kind, plugin.origin, plugin.distribution or plugin.module, plugin.version or "",
            plugin.status, f": {plugin.error}" if plugin.error else "",
        )  # fmt: skip
        if plugin.trace:
            log.debug("%s", plugin.trace)


def trace_calls(manager: pluggy.PluginManager) -> None:
    """Log each hook call: its arguments, shortened, its result and how long it took."""
    if not log.isEnabledFor(logging.DEBUG):
        return
    started: list[float] = []

    def before(hook: str, implementations: Any, arguments: Mapping[str, Any]) -> None:
        started.append(time.perf_counter())
        shown = ", ".join(f"{name}={_short(value)}" for name, value in arguments.items())
        log.debug("%shook %s(%s) of %s", "  " * (len(started) - 1), hook, shown, _names(implementations))

    def after(outcome: Any, hook: str, implementations: Any, arguments: Mapping[str, Any]) -> None:
        seconds = time.perf_counter() - started.pop()
        said = f"raised {outcome.exception!r}" if outcome.exception else f"-> {_short(outcome.get_result())}"
        log.debug("%shook %s %s in %.3f s", "  " * len(started), hook, said, seconds)

    manager.add_hookcall_monitoring(before, after)


def _names(implementations: Any) -> str:
    return ", ".join(implementation.plugin_name for implementation in reversed(implementations)) or "nobody"


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float | str | Mapping | list | tuple):
        return reprlib.repr(value)
    return f"<{type(value).__name__}>"
