"""Whatever a library raises of a file that it reads is about the file: one line, and exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from invarlock.core.errors import InvarlockError, UsageError, one_line

LONGEST = 600
"""Characters of a library's complaint that are shown: some print a whole file."""


@contextmanager
def complaints_of(what: str) -> Iterator[None]:
    """Turn what a library raises of a broken file into an error of input.

    :param what: the key, the file, and what cannot be done with it.
    :raises UsageError: in place of any exception but ours, ``KeyboardInterrupt`` and ``SystemExit``.
    """
    try:
        yield
    except InvarlockError:
        raise
    except Exception as error:
        raise UsageError(f"{what}: {_told(error)}") from error
    except BaseException as error:
        # A panic of a library in Rust, tokenizers for one, is no Exception.
        if type(error).__module__ != "pyo3_runtime":
            raise
        raise UsageError(f"{what}: {_told(error)}") from error


def _told(error: BaseException) -> str:
    text = one_line(error)
    if "trust_remote_code" in text:
        return "it needs code that lies beside the weights; set model.trust_remote_code: true if you trust that code"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
