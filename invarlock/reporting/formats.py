"""The formats that a report can be rendered in: one table, one module a format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from invarlock import hookimpl

if TYPE_CHECKING:
    from invarlock.reporting.reading import SavedReport


class ReportFormat(Protocol):
    """A form of a report."""

    @property
    def name(self) -> str:
        """As ``--format`` takes it."""

    @property
    def suffix(self) -> str:
        """Of files in this format, with its dot: it chooses the format where ``--format`` is not given."""

    def render(self, runs: Sequence[SavedReport]) -> str:
        """One report, or several side by side, as text; a report's own text is cleaned and still has to be escaped."""


@dataclass(frozen=True)
class ModuleFormat:
    """A format that is a module with a function ``render``, imported once it is asked for."""

    name: str
    suffix: str
    module: str

    def render(self, runs: Sequence[SavedReport]) -> str:
        # Start-up has use for neither templates nor rich.
        text: str = import_module(self.module).render(runs)
        return text


TERMINAL = ModuleFormat("terminal", ".txt", "invarlock.reporting.terminal")
FORMATS: Sequence[ReportFormat] = (
    TERMINAL,
    ModuleFormat("markdown", ".md", "invarlock.reporting.markdown"),
    ModuleFormat("html", ".html", "invarlock.reporting.page"),
    ModuleFormat("junit", ".xml", "invarlock.reporting.junit"),
    ModuleFormat("sarif", ".sarif", "invarlock.reporting.sarif"),
    ModuleFormat("json", ".json", "invarlock.reporting.raw"),
)


@hookimpl
def invarlock_report_formats() -> list[ReportFormat]:
    return list(FORMATS)
