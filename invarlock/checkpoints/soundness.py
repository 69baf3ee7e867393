"""Checks of a folder or file before a library opens it as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from invarlock.core.errors import InputError, one_line
from invarlock.core.paths import absolute, regular_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = (".json", ".safetensors", ".gguf", ".model", ".txt", ".jinja", ".tiktoken")
"""Endings of the files that libraries look for in a folder."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
POINTER, LARGEST_POINTER = b"version https://git-lfs.github.com/spec/", 1024
"""Beginning of a file that git-lfs left in place of the real one, and the size that its specification allows."""
ADAPTER = "adapter_config.json"
GENERATION = "generation_config.json"


def check_folder(folder: Path) -> None:
    """Refuse a folder of transformers whose files cannot be read as a checkpoint's.

    :raises InputError: what is wrong, and what to do.
    """
    try:
        # A folder of that name is left alone, as libraries do.
        files = [path for path in sorted(folder.iterdir()) if path.suffix in READ and not path.is_dir()]
    except OSError as error:
        raise InputError(f"{absolute(folder)} cannot be read: {error.strerror}") from error
    for path in files:
        check_file(path)
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise _refused(folder, f"is an adapter for {base}; merge it into that model first (merge_and_unload of peft)")
    if (folder / GENERATION).is_file():
        # Transformers goes on without it, and then generates with other settings.
        read_json(folder / GENERATION)
    if not (folder / "config.json").is_file():
        raise _refused(folder, "has no config.json: it is not a transformers checkpoint")
    if any((folder / name).is_file() for name in (SINGLE, INDEX)):
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise _refused(folder, f"stores weights in a pickle, {pickles[0]}, which runs code; convert it to safetensors")
    raise _refused(folder, f"has neither {SINGLE} nor {INDEX}")


def check_file(path: Path) -> None:
    """Refuse what is no file, or a pointer of git-lfs.

    :raises InputError: what is wrong, and what to do.
    """
    regular_file(path, "give a checkpoint")
    try:
        pointer = path.stat().st_size <= LARGEST_POINTER and path.read_bytes().startswith(POINTER)
    except OSError as error:
        raise InputError(f"{absolute(path)} cannot be read: {error.strerror}") from error
    if pointer:
        raise _refused(path, "is a git-lfs pointer, not the file itself; run git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint.

    :raises InputError: it cannot be read, or holds something else.
    """
    check_file(path)
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise _refused(path, f"is not valid JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise _refused(path, "is not a JSON object")
    return value


def _refused(path: Path, why: str) -> InputError:
    return InputError(f"{absolute(path)} {why}")
