"""A file with one JSON object per line, each a document."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from invarlock.api import hookimpl
from plugins_builtin.providers import text_files


@hookimpl
def invarlock_documents(dataset: Any) -> Sequence[str] | None:
    if dataset.provider != "local_jsonl":
        return None
    return text_files.json_lines(text_files.path_of(dataset), dataset.text_field)
