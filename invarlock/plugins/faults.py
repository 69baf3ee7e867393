"""Faults of plugins that are not being asked: wrappers around another plugin's hook, and threads left behind.

Neither may change what the plugin that is asked has found, nor be taken for its fault.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from invarlock.core.errors import UsageError, contained, located
from invarlock.core.results import Action, Finding

GUARDS = ("invarlock_observe", "invarlock_prepare", "invarlock_validate")
"""Hooks whose answer is a guard's, which nobody around it may take away."""

Fault = Callable[[Exception | str], None]

_ENDED = object()


@dataclass
class Faults:
    """Faults of such plugins, kept until the verdict, or whoever called a hook, takes them."""

    _found: list[Finding] = field(default_factory=list)

    def add(self, plugin: str, what: str) -> None:
        finding = Finding(plugin, Action.ABORT, what, failed=True)
        if finding not in self._found:
            self._found.append(finding)

    def take(self) -> list[Finding]:
        found, self._found[:] = list(self._found), []
        return found

    def accountable(self, plugin: str, hook: str, wrapper: Callable[..., Any]) -> Callable[..., Any]:
        """A wrapper whose mistakes are its own.

        If it fails, does not yield or loses the result, that is a fault of its plugin, and the result that it was given
        goes on to the caller.
        """

        def fault(error: Exception | str) -> None:
            # It is for the user, wherever nobody else has a word to say.
            if isinstance(error, UsageError) and hook not in GUARDS:
                raise error
            self.add(plugin, f"{hook}: {error if isinstance(error, str) else located(error)}")

        @functools.wraps(wrapper)
        def around(*args: Any) -> Generator[None, Any, Any]:
            running = wrapper(*args)
            try:
                with contained():
                    begun = next(running, _ENDED) is not _ENDED
            except Exception as error:
                fault(error)
                begun = False
            else:
                if not begun:
                    fault("the wrapper did not yield")
            try:
                result = yield
            except BaseException as error:
                if not begun or isinstance(error, KeyboardInterrupt):
                    raise
                return _recovered(running, error, fault)
            return _concluded(running, result, fault) if begun else result

        return around


def _concluded(running: Generator[None, Any, Any], result: Any, fault: Fault) -> Any:
    """Result that the wrapper returns; the one that it was given where it makes a mistake."""
    try:
        with contained():
            running.send(result)
    except StopIteration as ended:
        if not _lost(result, ended.value):
            return ended.value
        fault(f"the wrapper returned {type(ended.value).__name__} in place of the result; return what yield gave")
    except Exception as error:
        fault(error)
    else:
        running.close()
        fault("the wrapper yielded twice")
    return result


def _recovered(running: Generator[None, Any, Any], error: BaseException, fault: Fault) -> Any:
    """Result that the wrapper returns after an exception of the hook that it wraps.

    :raises BaseException: the exception, where the wrapper passes it on or makes a mistake.
    """
    try:
        with contained():
            running.throw(error)
    except StopIteration as ended:
        return ended.value
    except Exception as raised:
        if raised is not error:
            fault(raised)
    else:
        running.close()
        fault("the wrapper yielded twice")
    raise error


def _lost(result: Any, returned: Any) -> bool:
    """True if a wrapper returned nothing in place of something, or no mapping in place of one."""
    if isinstance(result, Mapping):
        return not isinstance(returned, Mapping)
    return result is not None and returned is None


class Threads:
    """Threads that plugins start: one that fails is its plugin's fault, whenever that is."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults
        self._owners: WeakKeyDictionary[threading.Thread, str | None] = WeakKeyDictionary()
        self._asked: str | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take each thread that fails while the block runs as a fault of the plugin that started it."""
        before, threading.excepthook = threading.excepthook, self._failed
        try:
            yield
        finally:
            threading.excepthook = before

    @contextmanager
    def of(self, plugin: str) -> Iterator[None]:
        """A turn of this plugin: threads that appear in it are its own."""
        self._claim(self._asked)
        before, self._asked = self._asked, plugin
        try:
            yield
        finally:
            self._claim(plugin)
            self._asked = before

    def _claim(self, plugin: str | None) -> None:
        for thread in threading.enumerate():
            self._owners.setdefault(thread, plugin)

    def _failed(self, failure: threading.ExceptHookArgs) -> None:
        owner = self._owners.get(failure.thread, self._asked) if failure.thread else self._asked
        error = failure.exc_value or failure.exc_type()
        self._faults.add(owner or "a thread", f"a thread of it failed: {located(error)}")
