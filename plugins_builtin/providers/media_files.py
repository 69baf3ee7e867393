"""Samples with media: a folder of files, or JSON with one object per line that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from invarlock.api import COLUMNS, Record, UsageError, named_by, regular_file
from plugins_builtin.providers import text_files

MEDIA = ("image", "audio")


def read(dataset: Any, column: str, endings: Sequence[str]) -> list[Record]:
    """The samples of a folder, or of a file that names them.

    :param column: the one that each sample has.
    :param endings: of the files of a folder.
    :raises UsageError: there are none, or a file is missing.
    """
    path = text_files.path_of(dataset, "the path of a folder, or of a file with one JSON object per line")
    if path.is_dir():
        return _of_folder(path, column, endings)
    records = list(of_lines(path, dataset.text_field))
    for record in records:
        if column not in record.columns:
            raise UsageError(f"dataset.path: {record.where}: no {column!r}; provider {dataset.provider} reads its path")
    return records


def of_lines(path: Path, text_field: str) -> Iterator[Record]:
    """The samples of a file, whose paths are relative to it."""
    for where, entry in text_files.objects(path):
        given = {name: entry.get(text_field if name == "text" else name) for name in COLUMNS}
        for name, value in given.items():
            if value is not None and not isinstance(value, str):
                raise UsageError(f"dataset.path: {where}: {name} holds a {type(value).__name__}, not text")
        yield Record(where, **(given | _files(path.parent, given)))


def _files(folder: Path, given: Mapping[str, str | None]) -> dict[str, Any]:
    files = {name: folder / value for name in MEDIA if (value := given[name]) is not None}
    for file in files.values():
        with named_by("dataset.path"):
            regular_file(file, "correct the path")
    return files


def _of_folder(folder: Path, column: str, endings: Sequence[str]) -> list[Record]:
    """A sample for each file, whose text is in a file of the same name that ends with ``.txt``, if it is there."""
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in endings and file.is_file())
    if not files:
        raise UsageError(f"dataset.path: no {column} in {folder}: files that end with {', '.join(endings)} are read")
    of_images = column == "image"
    return [
        Record(str(file), _text_beside(file), image=file if of_images else None, audio=None if of_images else file)
        for file in files
    ]


def _text_beside(file: Path) -> str | None:
    beside = file.with_suffix(".txt")
    return text_files.read(beside).strip() if beside.is_file() else None
