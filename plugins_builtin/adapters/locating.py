"""Location of a checkpoint, on this machine or in a hub's cache, and its ``config.json``."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from invarlock.api import READ, InputError, absolute, is_hub_id, one_line, read_json


def folder_of(model_id: str, options: Mapping[str, Any]) -> Path:
    """The folder of a checkpoint; of an id on a hub, the one in the cache, fetched first where the network is on.

    :raises InputError: when there is none to be had.
    """
    if Path(model_id).exists():
        return Path(model_id)
    if _offline():
        return _cached_config(model_id, options).parent
    from huggingface_hub import snapshot_download

    patterns = [f"*{ending}" for ending in READ]
    with _sought_on_hub(model_id):
        return Path(snapshot_download(model_id, revision=options.get("revision"), allow_patterns=patterns))


def is_here(model_id: str) -> bool:
    """True if a checkpoint cannot come from anywhere but this machine."""
    return Path(model_id).exists() or _offline()


def architectures(model_id: str, options: Mapping[str, Any]) -> list[str]:
    """Names of the model classes in ``config.json``.

    :raises InputError: ``config.json`` is broken.
    """
    names = read_config(model_id, options).get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{model_id}: config.json: architectures: expected a list of names, found {names!r}")
    return names


def read_config(model_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's ``config.json``; empty for a GGUF file, which has none.

    :raises InputError: when there is none to be had.
    """
    path = Path(model_id) / "config.json"
    if model_id.endswith(".gguf"):
        return {}
    if not Path(model_id).exists():
        path = _cached_config(model_id, options)
    elif not os.path.lexists(path):
        return {}
    return read_json(path)


def _cached_config(model_id: str, options: Mapping[str, Any]) -> Path:
    from transformers.utils import cached_file

    with _sought_on_hub(model_id):
        return Path(str(cached_file(model_id, "config.json", revision=options.get("revision"))))


@contextmanager
def _sought_on_hub(model_id: str) -> Iterator[None]:
    if not is_hub_id(model_id):
        raise InputError(f"{absolute(model_id)} does not exist; give a checkpoint folder or an id on a hub")
    try:
        yield
    except (OSError, ValueError) as error:
        todo = "check the path, or add --allow-network to download it"
        if not _offline():
            todo = f"the hub does not have it either: {one_line(error)}"
        where = f"neither a local directory ({absolute(model_id)}) nor a cached checkpoint"
        raise InputError(f"{model_id} is {where}; {todo}") from error


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE") == "1"
