"""A file of plain text, which is one document."""

from __future__ import annotations

from typing import Any

from invarlock.api import hookimpl
from plugins_builtin.providers import text_files


@hookimpl
def invarlock_documents(dataset: Any) -> list[str] | None:
    if dataset.provider != "local_text":
        return None
    return [text_files.read(text_files.path_of(dataset))]
