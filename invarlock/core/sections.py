"""Sections that plugins add to a report: plain data, checked where it comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from invarlock.core.errors import as_raised, contained
from invarlock.core.plain import METRICS, SECTIONS, Reader, Unreadable, as_text, kind_name

Cell = str | int | float | bool | None
KEYS = ("title", "text", "columns", "rows")
MOST = 20
"""Sections of one plugin: all of them stand on one page."""


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
    def all_from_plugin(cls, source: str, returned: Any) -> list[ReportSection]:
        """Read the sections that a plugin returned, whatever they are.

        :raises ValueError: with what is wrong in them.
        """
        try:
            with contained():
                given = list(islice(returned, MOST + 1))
        except Exception as error:
            why = f"raises {kind_name(as_raised(error), article=False)}"
            raise Unreadable(f"{kind_name(returned)} is no list of sections: it {why}") from None
        found = [cls.from_plugin(source, section) for section in given[:MOST]]
        if len(given) > MOST:
            found[-1] = found[-1]._with_note([f"the first {MOST} sections of the plugin are kept"])
        return found

    @classmethod
    def from_plugin(cls, source: str, returned: object) -> ReportSection:
        """Read one section as a plugin returned it; what is too long is cut, and its text says so.

        :raises ValueError: with what is wrong in it.
        """
        if not issubclass(type(returned), Mapping):
            raise Unreadable(f"a section is {kind_name(returned)}, not a dict with 'title'")
        values, cut = Reader.strict("section", returned, SECTIONS)
        if unknown := [key for key in values if key not in KEYS]:
            raise Unreadable(f"a section has the key {unknown[0][:50]!r}; known are {', '.join(KEYS)}")
        title, text = values.get("title"), values.get("text", "")
        if not isinstance(title, str) or not title.strip() or not isinstance(text, str):
            raise Unreadable("a section needs a 'title', a text, and its 'text' is one too")
        columns, rows = values.get("columns", []), values.get("rows", [])
        if not all(isinstance(entry, list) for entry in (columns, rows, *(rows if isinstance(rows, list) else ()))):
            raise Unreadable(f"section {title[:50]!r}: 'columns' is a list, and 'rows' a list of lists")
        if cut and rows and len(rows[-1]) < len(columns):
            del rows[-1]
        if any(len(row) != len(columns) for row in rows):
            needed = f"each row needs as many cells as there are columns, {len(columns)}"
            raise Unreadable(f"section {title[:50]!r}: {needed}")
        cells = [[as_text(cell) if isinstance(cell, dict | list) else cell for cell in row] for row in rows]
        return cls(source, title, text, [*map(as_text, columns)], cells)._with_note(cut)

    def _with_note(self, cut: Sequence[str]) -> ReportSection:
        return replace(self, text="\n".join(filter(None, [self.text, *(f"cut: {what}" for what in cut)])))


def extra_from_plugin(returned: object) -> dict[str, Any]:
    """Additions of a plugin below ``extra`` of a report; None adds nothing.

    :raises ValueError: with what is wrong in it.
    """
    if returned is not None and not issubclass(type(returned), Mapping):
        raise Unreadable(f"returned {kind_name(returned)}, not a dict of what goes below 'extra'")
    made, cut = Reader.strict("extra", {} if returned is None else returned, METRICS)
    return {**made, "cut": cut[0]} if cut else made
