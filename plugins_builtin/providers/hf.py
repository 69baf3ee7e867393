"""A column of a table that the ``datasets`` library maps into memory; only what is looked at is read."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from invarlock.api import UsageError, hookimpl, one_line
from plugins_builtin.providers.text_files import Column, no_field


@hookimpl
def invarlock_documents(dataset: Any) -> Sequence[str] | None:
    if dataset.provider != "hf":
        return None
    if dataset.path is None:
        raise UsageError("dataset.path: is required by provider hf: a local folder or the id of a dataset on the hub")
    if Path(dataset.path).is_file():
        raise UsageError(f"dataset.path: {dataset.path} is a file; provider hf reads folders, local_jsonl reads files")
    table = _table(dataset)
    if dataset.text_field not in table.column_names:
        raise no_field(dataset.text_field, table.column_names, dataset.path)
    return Column(table[dataset.text_field], dataset.text_field, dataset.path)


def _table(dataset: Any) -> Any:
    try:
        # Here, because the library is optional and slow to import.
        datasets = import_module("datasets")
    except ImportError:
        raise UsageError("dataset.provider: hf needs datasets: pip install 'invarlock[hf]'") from None
    try:
        return datasets.load_dataset(dataset.path, dataset.name, split=dataset.split)
    except ConnectionError:
        raise UsageError(
            f"dataset.path: {dataset.path} is not on this machine and the hub cannot be reached; the network is off "
            "without --allow-network"
        ) from None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(
            f"dataset.path: cannot load {dataset.path} (name {dataset.name}, split {dataset.split}): {one_line(error)}"
        ) from error
