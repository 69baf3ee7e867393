"""A file of pairs, one JSON object per line: two texts, an image and its text, or a sound and its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from invarlock.api import COLUMNS, Record, UsageError, hookimpl
from plugins_builtin.providers import media_files, text_files


@hookimpl
def invarlock_documents(dataset: Any) -> Sequence[Record] | None:
    if dataset.provider != "pairs":
        return None
    records = list(media_files.of_lines(text_files.path_of(dataset), dataset.text_field))
    for record in records:
        if len(record.columns) < 2:
            found = ", ".join(record.columns) or "none of them"
            raise UsageError(f"dataset.path: {record.where}: a pair is two of {', '.join(COLUMNS)}; there is {found}")
    return records
