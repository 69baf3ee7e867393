"""Reports read back from disk; they may lack anything, or be of somebody who means harm.

Here their text is cleaned: nothing in it steers whatever shows it. It still has to be escaped. What a report lacks, or
holds with another type, is None, an empty collection, or the text ``unknown``, even where a sound report always has it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from urllib.parse import quote

from invarlock.core.errors import UsageError, one_line
from invarlock.core.paths import absolute
from invarlock.core.results import Action
from invarlock.core.text import cleaned
from invarlock.reporting.plain_data import Node
from invarlock.reporting.report import FORMAT_VERSION, Report


@dataclass(frozen=True)
class SavedReport:
    """A report as ``report.json`` holds it, and the run's folder if there is one."""

    values: Mapping[str, Any]
    folder: Path | None = None
    seen_from: Path | None = None
    """The folder that a rendering goes to, for links; by default the working folder."""
    files: Path | None = None
    """The folder that holds the run's files, while they are not in place yet."""

    @classmethod
    def read(cls, path: Path, seen_from: Path | None = None) -> SavedReport:
        """
        :param path: a run's folder, or its report.json.
        :param seen_from: the folder that a rendering goes to.
        :raises UsageError: there is no report, or it is none of this format.
        """
        file = path / "report.json" if path.is_dir() else path
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{absolute(file)}: there is no report; name a run's folder or its report.json") from None
        except OSError as error:
            raise UsageError(f"{file}: cannot be read: {one_line(error)}") from error
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{file}: is not a report: {one_line(error)}") from error
        version = values.get("format_version") if isinstance(values, dict) else None
        if version != FORMAT_VERSION:
            raise UsageError(
                f"{file}: is not a report of format {FORMAT_VERSION}, its format_version is {version!r:.80}"
            )
        return cls(values, file.absolute().parent, seen_from)

    @cached_property
    def report(self) -> Report:
        """The report with its text cleaned."""
        report: Report = read_as(Report, _cleaned(self.values))
        return report

    @property
    def name(self) -> str:
        """The folder's, or the model's."""
        return cleaned(self.folder.name) if self.folder else Path(self.report.model.id).name or "unknown"

    @property
    def page(self) -> str | None:
        """A link to the page beside the report."""
        if self.folder is None or not (self.folder / "report.html").is_file():
            return None
        return quote(os.fsencode(os.path.relpath(self.folder / "report.html", self.seen_from or Path.cwd())))

    @property
    def saved_bytes(self) -> int | None:
        """Size of the saved artifacts."""
        # By the names that they have on disk: not cleaned.
        names = [*Node(self.values)["artifacts"].items()]
        folder = self.files or self.folder
        if folder is None or not names:
            return None
        try:
            return sum((folder / name).stat().st_size for name, _ in names)
        except (OSError, ValueError):
            return None


def read_as(kind: Any, value: Any) -> Any:
    """Plain data as a value of a type, as far as it is one."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        node = Node(value)
        return kind(**{name: read_as(of_it, node[name].value) for name, of_it in _fields(kind).items()})
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        return _one_of(inner, value)
    if outer is Literal:
        return value if value in inner else "unknown"
    if outer is tuple and inner[-1] is not Ellipsis:
        return tuple(read_as(one, entry.value) for one, entry in zip(inner, Node(value).entries(), strict=False))
    if outer in (list, tuple):
        return outer(read_as(inner[0], entry) for entry in (value if isinstance(value, list) else ()))
    if outer in (dict, Mapping):
        return {key: read_as(inner[1], entry.value) for key, entry in Node(value).items()}
    return value if kind is Any else SCALARS[kind](Node(value))


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:
    if {str, float} <= {*kinds}:
        # A cell of a table.
        return value
    kind = kinds[0]
    if value is None or (get_origin(kind) is tuple and len(Node(value).entries()) != len(get_args(kind))):
        return None
    if dataclasses.is_dataclass(kind) and not (value and isinstance(value, Mapping)):
        return None
    return read_as(kind, value)


SCALARS: Mapping[Any, Callable[[Node], Any]] = {
    str: lambda node: node.text("unknown"),
    float: Node.number,
    int: Node.whole,
    bool: Node.flag,
    Action: lambda node: next((action for action in Action if action == node.value), None),
}


@cache
def _fields(kind: Any) -> dict[str, Any]:
    return {name: of_it for name, of_it in get_type_hints(kind).items() if name in kind.__dataclass_fields__}


def _cleaned(value: Any) -> Any:
    if isinstance(value, str):
        return cleaned(value)
    if isinstance(value, Mapping):
        return {cleaned(str(key)): _cleaned(entry) for key, entry in value.items()}
    return [_cleaned(entry) for entry in value] if isinstance(value, list) else value
