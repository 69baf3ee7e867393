"""Samples that are more than a text: pairs of texts, images and sounds, with or without a text of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invarlock.core.errors import UsageError

COLUMNS = ("text", "text_pair", "image", "audio")


@dataclass(frozen=True)
class Record:
    """One sample of a dataset; None stands for a column that it lacks."""

    where: str
    """The file and the line that it is from, for messages."""
    text: str | None = None
    text_pair: str | None = None
    """The second text of a pair: the passage of a query."""
    image: Path | None = None
    audio: Path | None = None

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(name for name in COLUMNS if getattr(self, name) is not None)


Samples = Sequence[Any]
"""Plain texts, or records."""


def columns_of(samples: Samples | None) -> frozenset[str]:
    """The columns of a dataset, as its first sample has them; plain text has one, and no data none."""
    if samples is None:
        return frozenset()
    first = samples[0] if len(samples) else ""
    return first.columns if isinstance(first, Record) else frozenset({"text"})


def column(samples: Samples, name: str) -> Sequence[Any]:
    """The values of one column; plain text is not read before its turn.

    :raises UsageError: a sample lacks it.
    """
    if not len(samples) or isinstance(samples[0], str):
        return samples
    # By number: what a provider returned need not end with an IndexError.
    records = [samples[row] for row in range(len(samples))]
    for record in records:
        if name not in record.columns:
            raise UsageError(f"dataset.path: {record.where} has no {name}, and the first sample has")
    return [getattr(record, name) for record in records]
