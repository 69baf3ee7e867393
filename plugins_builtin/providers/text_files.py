"""Files of text: read whole, or as JSON with one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from invarlock.api import UsageError, named_by, nearest, one_line, regular_file


def path_of(dataset: Any, to_give: str = "the path of a file") -> Path:
    """:raises UsageError: the configuration names no file."""
    if dataset.path is None:
        raise UsageError(f"dataset.path: is required by provider {dataset.provider}: give {to_give}")
    return Path(dataset.path)


def read(path: Path) -> str:
    """:raises UsageError: it cannot be read, or is not UTF-8 text."""
    with named_by("dataset.path"):
        regular_file(path, "give the path of a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"dataset.path: {path} is not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise UsageError(f"dataset.path: cannot read {path}: {error.strerror}") from None


def json_lines(path: Path, field: str) -> Column:
    """A field of each line.

    :raises UsageError: a line is not a JSON object, or lacks the field.
    """
    return Column([_value(record, where, field) for where, record in objects(path)], field, str(path))


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The object on each line, and where that is.

    :raises UsageError: a line is not a JSON object.
    """
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    for number, line in enumerate(read(path).split("\n"), start=1):
        if line.strip():
            yield (where := f"{path}, line {number}"), _object(line, where)


class Column(Sequence[str]):
    """Values of one field, held to be text when they are read."""

    def __init__(self, values: Sequence[Any], field: str, where: str) -> None:
        self._values, self._field, self._where = values, field, where

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, row: Any) -> Any:
        text = self._values[row]
        if not isinstance(text, str):
            found = type(text).__name__
            raise UsageError(f"dataset.text_field: {self._field!r} holds a {found}, not text, in {self._where}")
        return text


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise UsageError(f"dataset.path: {where}: not JSON: {problem}; one object per line is expected") from None
    if not isinstance(record, dict):
        raise UsageError(f"dataset.path: {where}: a {type(record).__name__}; one object per line is expected")
    return record


def _value(record: dict[str, Any], where: str, field: str) -> Any:
    if field not in record:
        raise no_field(field, list(record), where)
    return record[field]


def no_field(field: str, known: Sequence[str], where: str) -> UsageError:
    return UsageError(
        f"dataset.text_field: no {field!r} in {where}{nearest(field, known)}; there is {', '.join(known) or 'nothing'}"
    )
