"""The held-out text of the demo model, one document per chapter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import invarlock.api
from invarlock.api import UsageError, hookimpl
from plugins_builtin.providers import text_files

TEXT = Path(invarlock.api.__file__).parent / "demo" / "text.jsonl"


@hookimpl
def invarlock_documents(dataset: Any) -> Sequence[str] | None:
    if dataset.provider != "demo":
        return None
    if dataset.path is not None:
        raise UsageError("dataset.path: provider demo reads no path; did you mean provider: local_jsonl?")
    return text_files.json_lines(TEXT, "text")
