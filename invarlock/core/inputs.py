"""Whatever a library raises of a file that it reads is about the file: one line, and exit status 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from invarlock.core.errors import InputError, InvarlockError, one_line

LONGEST = 600
"""Characters of a library's complaint that are shown: some print a whole file."""


@contextmanager
def complaints_of(what: str) -> Iterator[None]:
    """Turn what a library raises of a broken file into an error of input.

    :param what: the file, and what cannot be done with it.
    :raises InputError: in place of any exception but ours, ``KeyboardInterrupt`` and ``SystemExit``.
    """
    try:
        yield
    except InvarlockError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        raise InputError(f"{what}: {_told(error)}") from error


@contextmanager
def panics_unprinted() -> Iterator[None]:
    """Keep what Rust prints of a panic, stack and all, from standard error: the exception tells it, too."""
    if sys.stderr is None:
        yield
        return
    # Only here: start-up counts milliseconds.
    import tempfile

    panicked = False
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        stderr = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            panicked = _is_panic(error) or _is_panic(error.__cause__)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            if not panicked:
                # What cannot be written is lost, as anywhere else.
                with suppress(OSError):
                    os.write(2, held.read())


def _is_panic(error: BaseException | None) -> bool:
    """True of a library in Rust, such as tokenizers, that gave up; that is no ``Exception``."""
    return type(error).__module__ == "pyo3_runtime"


def _told(error: BaseException) -> str:
    text = one_line(error)
    if "trust_remote_code" in text:
        return "it needs code that lies beside the weights; set model.trust_remote_code: true if you trust that code"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
