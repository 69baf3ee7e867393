"""Exit codes, and the errors that carry them."""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from invarlock.core.text import on_one_line

LONGEST = 4_000
"""Characters of a message: a page of a terminal."""


class ExitCode(IntEnum):
    """Exit status of a process of ``invarlock``; the man pages and the README hold the same table."""

    ACCEPTED = 0
    """The edit was accepted; with ``--strict``, without a warning."""
    REJECTED = 1
    """The edit was not accepted: rollback or abort; with ``--strict``, also a warning."""
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
    """The user can fix it: a wrong option, key, name, file."""

    exit_code = ExitCode.USAGE


class InputError(UsageError):
    """A file or folder that the user named is wrong, or does not fit the rest; whoever read its name adds the key."""

    key = ""

    def __str__(self) -> str:
        return f"{self.key}: {super().__str__()}" if self.key else super().__str__()


class NotStreamedError(InputError):
    """A checkpoint that may be sound, but whose weights cannot be left on disk."""


class PluginError(InvarlockError):
    """A plugin failed; the message begins with its name."""


class PeerError(PluginError):
    """Another process of the run failed."""


class EscapedError(InvarlockError):
    """A ``SystemExit``, a ``GeneratorExit`` or the like out of code that is not ours, as an error like any other."""


@contextmanager
def contained() -> Iterator[None]:
    """Run foreign code in the block: of what is no ``Exception`` only Ctrl-C leaves it as it is.

    :raises EscapedError: in place of anything else that would end the process unseen by ``except Exception``.
    """
    process = os.getpid()
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise EscapedError(one_line(error)) from error
    finally:
        if os.getpid() != process:
            # A child that the code forked: it must not go on as a second one of us.
            os._exit(ExitCode.FAILED)


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Begin the message of an ``InputError`` that the block raises with the key, option or argument that named it."""
    try:
        yield
    except InputError as error:
        error.key = error.key or key
        raise


def as_raised(error: BaseException) -> BaseException:
    """Exception that foreign code raised, where ``contained`` put an error in its place."""
    return error.__cause__ if isinstance(error, EscapedError) and error.__cause__ else error


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to a misspelled one, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def unknown(kind: str, name: str, known: Collection[str]) -> str:
    """Message about an unknown name, with the nearest known one, else with all of them."""
    return f"unknown {kind} {name!r}" + (nearest(name, known) or f"; known are {', '.join(known)}")


def one_line(error: BaseException) -> str:
    """An exception as a single line: its type, unless it is one of ours, and its message."""
    try:
        text = on_one_line(str(error)[:LONGEST])
    except KeyboardInterrupt:
        raise
    except BaseException as failure:
        text = f"its message raises {type(failure).__name__}"
    if isinstance(error, InvarlockError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def located(error: BaseException, file: str | None = None) -> str:
    """An exception as a single line, with the file and the line that it was raised at, unless it is one of ours.

    :param file: prefer the innermost frame of this file to the innermost one of all.
    """
    if isinstance(error, InvarlockError) and not isinstance(error, EscapedError):
        return one_line(error)
    raised = BaseException.__dict__["__traceback__"].__get__(as_raised(error))
    frames = traceback.extract_tb(raised)
    frame = next((frame for frame in reversed(frames) if frame.filename == file), frames[-1] if frames else None)
    return f"{one_line(error)} ({Path(frame.filename).name}:{frame.lineno})" if frame else one_line(error)
