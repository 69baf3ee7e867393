"""Findings, and the remedy of each."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Outcome(StrEnum):
    OK = "ok"
    WARNING = "warning"
    """A run may go well all the same."""
    PROBLEM = "problem"
    NOT_CHECKED = "not checked"


@dataclass(frozen=True)
class Check:
    status: Outcome
    subject: str
    what: str
    todo: str = ""
    """Empty where nothing has to be done."""


def size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
