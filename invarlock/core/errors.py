"""Exit codes, and the errors that carry them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What a process of ``invarlock`` ends with; the man pages and the README hold the same table."""

    ACCEPTED = 0
    """The edit was accepted; with ``--strict``, without a warning."""
    REJECTED = 1
    """The edit was rejected: rollback or abort; with ``--strict``, also a warning."""
    USAGE = 2
    """The command line, the configuration or an input is wrong; nothing was run."""
    FAILED = 3
    """A plugin or InvarLock itself failed: there is no verdict to rely on."""
    HUNG_UP = 129
    """SIGHUP: the terminal is gone."""
    INTERRUPTED = 130
    """SIGINT: Ctrl-C."""
    TERMINATED = 143
    """SIGTERM, as ``kill``, containers and schedulers send it."""


class InvarlockError(Exception):
    """One line that says what is wrong, where, and what to do."""

    exit_code = ExitCode.FAILED


class UsageError(InvarlockError):
    """The user can mend it: a wrong option, key, name, file."""

    exit_code = ExitCode.USAGE


class PluginError(InvarlockError):
    """A plugin failed; the message begins with its name."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to a misspelled one, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(error: BaseException) -> str:
    """An exception as a single line: its type, unless it is one of ours, and its message."""
    text = " ".join(str(error).split())
    if isinstance(error, InvarlockError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
