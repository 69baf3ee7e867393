"""Standard output and error of the process: nothing that becomes of what is written there is an error of a plugin."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO, cast

from invarlock.core.errors import UsageError


class _Forgiving(io.RawIOBase):
    """A file descriptor that may be full, or closed at the other end: after a failure what is written is lost."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        while self.failure is None:
            try:
                return os.write(self._descriptor, data)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.failure = error
        return len(data)


_result: tuple[TextIO, _Forgiving] | None = None
"""Stream for the result of the command, if that is not what ``sys.stdout`` is by now."""


def take(*, aside: bool) -> None:
    """Take the standard streams: glyphs that a terminal lacks are replaced, and what cannot be written is lost.

    :param aside: keep standard output for the result alone: whatever plugins, and processes that they start, write
        to it goes to standard error.
    """
    global _result
    for descriptor in range(3):
        _open_if_closed(descriptor)
    sys.stderr, _ = _text(2, sys.stderr)
    _result = _text(os.dup(1) if aside else 1, sys.stdout)
    if aside:
        os.dup2(2, 1)
        sys.stdout = _text(1, sys.stdout)[0]
    else:
        sys.stdout = _result[0]
    _taken[:] = [_result[0], sys.stdout, sys.stderr]


_taken: list[TextIO] = []
"""Streams of this module's: ``sys.stdout`` can be anything by the end of a run."""


def flush() -> None:
    """Write what is left to be written, and let the interpreter flush no stream of a plugin's."""
    for stream in _taken:
        stream.flush()
    if _taken:
        _, sys.stdout, sys.stderr = _taken


@contextmanager
def aside() -> Iterator[None]:
    """Keep standard output free in the block: what modules print while they are imported goes to standard error."""
    with redirect_stdout(sys.stderr):
        if _result is None:
            yield
            return
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def result() -> TextIO:
    """The stream for the result of a command."""
    return _result[0] if _result else sys.stdout


def require_written() -> None:
    """Make sure that the result was written; a reader that has gone had enough of it.

    :raises UsageError: it was not.
    """
    result().flush()
    failure = _result[1].failure if _result else None
    if failure and failure.errno != errno.EPIPE:
        raise UsageError(f"standard output: {failure.strerror}: what was printed is not complete")


def _open_if_closed(descriptor: int) -> None:
    """A file that is opened later must not become standard output."""
    try:
        os.fstat(descriptor)
    except OSError:
        # The lowest that is free, which is this one.
        os.open(os.devnull, os.O_RDWR)


class _Text(io.TextIOWrapper):
    """Text that nobody closes: a plugin that closes ``sys.stdout`` must not silence the verdict."""

    def close(self) -> None:
        self.flush()


def _text(descriptor: int, before: TextIO | None) -> tuple[TextIO, _Forgiving]:
    raw = _Forgiving(descriptor)
    encoding, by_line = before.encoding if before else "utf-8", raw.isatty() or descriptor == 2
    buffered = io.BufferedWriter(cast(io.RawIOBase, raw))
    text = _Text(buffered, encoding, errors="replace", line_buffering=by_line)
    return text, raw
