"""What plugins add to a report: plain data, checked where it comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Cell = str | int | float | bool | None
KEYS = ("title", "text", "columns", "rows")


@dataclass(frozen=True)
class ReportSection:
    """A section of a report: text, a table, or both."""

    source: str
    """The plugin that added it."""
    title: str
    text: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    """Each as long as ``columns``."""

    @classmethod
    def from_plugin(cls, source: str, returned: object) -> ReportSection:
        """Read one section as a plugin returned it.

        :raises ValueError: with what is wrong in it.
        """
        if not isinstance(returned, Mapping):
            raise ValueError(f"a section is a {type(returned).__name__}, not a dict with 'title'")
        if unknown := [key for key in returned if key not in KEYS]:
            raise ValueError(f"a section has the key {unknown[0]!r}; known are {', '.join(KEYS)}")
        title, text = returned.get("title"), returned.get("text", "")
        if not isinstance(title, str) or not title.strip() or not isinstance(text, str):
            raise ValueError("a section needs a 'title', a text, and its 'text' is one too")
        columns, rows = returned.get("columns", []), returned.get("rows", [])
        if not _is_list(columns) or not _is_list(rows) or not all(_is_list(row) for row in rows):
            raise ValueError(f"section {title!r}: 'columns' is a list, and 'rows' a list of lists")
        if any(len(row) != len(columns) for row in rows):
            raise ValueError(f"section {title!r}: each row needs as many cells as there are columns, {len(columns)}")
        return cls(source, title, text, [str(column) for column in columns], [[*map(_cell, row)] for row in rows])


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _cell(value: Any) -> Cell:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
