"""The documents of a dataset, whichever provider holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Protocol

import torch

from invarlock.core.errors import UsageError, nearest, one_line
from invarlock.core.paths import regular_file


class Dataset(Protocol):
    """The section ``dataset`` of a configuration; ``seq_len`` and ``stride`` count tokens, the others say windows."""

    @property
    def provider(self) -> str: ...
    @property
    def path(self) -> str | None: ...
    @property
    def name(self) -> str | None: ...
    @property
    def text_field(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def stride(self) -> int | None: ...
    @property
    def preview_n(self) -> int: ...
    @property
    def final_n(self) -> int: ...
    @property
    def seed(self) -> int: ...


def documents(dataset: Dataset, generator: torch.Generator) -> Iterator[str]:
    """The documents that hold text, in an order shuffled by the generator.

    :raises UsageError: there is nothing to read, or it is not what the configuration says it is.
    """
    read = _PROVIDERS.get(dataset.provider)
    if read is None:
        guess = nearest(dataset.provider, _PROVIDERS)
        raise UsageError(
            f"dataset.provider: {dataset.provider!r} is not known{guess}; there is {', '.join(_PROVIDERS)}"
        )
    texts = read(dataset)
    blank = True
    for row in torch.randperm(len(texts), generator=generator).tolist():
        text = texts[row]
        if not isinstance(text, str):
            raise UsageError(f"dataset.text_field: {dataset.text_field!r} holds a {type(text).__name__}, not text")
        if text.strip():
            blank = False
            yield text
    if blank:
        raise UsageError(f"dataset.path: {dataset.path} holds no text")


def _local_jsonl(dataset: Dataset) -> list[Any]:
    path = _given_path(dataset)
    return _json_lines(_read(path), path, dataset.text_field)


def _local_text(dataset: Dataset) -> list[str]:
    return [_read(_given_path(dataset))]


def _demo(dataset: Dataset) -> list[Any]:
    """The held-out text of the demo model, one chapter a document."""
    path = resources.files("invarlock") / "demo" / "text.jsonl"
    return _json_lines(_read(path), path, "text")


def _hf(dataset: Dataset) -> Sequence[Any]:
    """A column of a table that the ``datasets`` library maps into memory; only what is looked at is read."""
    if dataset.path is None:
        raise UsageError("dataset.path: provider hf needs a local folder or the id of a dataset on the hub")
    try:
        # Here, because the library is optional and slow to import.
        datasets = import_module("datasets")
    except ImportError:
        raise UsageError("dataset.provider: hf needs a library: pip install datasets") from None
    try:
        table = datasets.load_dataset(dataset.path, dataset.name, split=dataset.split)
    except ConnectionError:
        raise UsageError(
            f"dataset.path: {dataset.path} is not on this machine and the hub cannot be reached; the network is off "
            "without --allow-network"
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"dataset.path: cannot load {dataset.path} (name {dataset.name}, split {dataset.split}): {one_line(error)}"
        ) from error
    if dataset.text_field not in table.column_names:
        raise _no_field(dataset.text_field, table.column_names, dataset.path)
    column: Sequence[Any] = table[dataset.text_field]
    return column


_PROVIDERS: dict[str, Callable[[Dataset], Sequence[Any]]] = {
    "local_jsonl": _local_jsonl,
    "local_text": _local_text,
    "demo": _demo,
    "hf": _hf,
}


def _given_path(dataset: Dataset) -> Path:
    if dataset.path is None:
        raise UsageError(f"dataset.path: provider {dataset.provider} needs the path of a file")
    return Path(dataset.path)


def _read(path: Traversable) -> str:
    if isinstance(path, Path):
        regular_file(path, "dataset.path", "give the path of a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"dataset.path: {path} is not UTF-8 text (byte {error.start}); convert it") from None
    except OSError as error:
        raise UsageError(f"dataset.path: cannot read {path}: {error.strerror}") from None


def _json_lines(content: str, path: Traversable, field: str) -> list[Any]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = enumerate(content.split("\n"), start=1)
    return [_value(line, f"{path}, line {number}", field) for number, line in lines if line.strip()]


def _value(line: str, where: str, field: str) -> Any:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        problem = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error)
        raise UsageError(f"dataset.path: {where}: not JSON: {problem}; one object a line is expected") from None
    if not isinstance(record, dict):
        raise UsageError(f"dataset.path: {where}: a {type(record).__name__}; one object a line is expected")
    if field not in record:
        raise _no_field(field, list(record), where)
    return record[field]


def _no_field(field: str, known: Sequence[str], where: str) -> UsageError:
    return UsageError(
        f"dataset.text_field: no {field!r} in {where}{nearest(field, known)}; there is {', '.join(known) or 'nothing'}"
    )
