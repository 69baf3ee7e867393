"""Files that serve a model beside its weights, and that its class does not save: they go along with a saved model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

MODULES = "modules.json"
"""Of sentence-transformers; it names folders of further modules."""
FILES = (
    MODULES,
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""How texts, images and sounds become a model's inputs, and its outputs vectors."""


def copy_companions(source: str, target: Path) -> None:
    """Copy the files that lie beside the weights of a checkpoint, a folder or an id in a hub's cache."""
    folder = _folder_of(source)
    if folder is None:
        return
    for path in _companions(folder):
        copy = target / path.relative_to(folder)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            # The content alone: a cache holds links to it.
            shutil.copyfile(path, copy)


def _folder_of(source: str) -> Path | None:
    if Path(source).exists():
        return Path(source) if Path(source).is_dir() else None
    # Only here: start-up counts milliseconds.
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(source, local_files_only=True))
    except (OSError, ValueError):
        return None


def _companions(folder: Path) -> Iterator[Path]:
    yield from (folder / name for name in FILES if (folder / name).is_file())
    for module in _folders(folder):
        if module.resolve() != folder.resolve() and module.resolve().is_relative_to(folder.resolve()):
            yield from (path for path in module.rglob("*") if path.is_file())


def _folders(folder: Path) -> list[Path]:
    """The folders of the modules that a folder lists."""
    try:
        entries = json.loads((folder / MODULES).read_text(encoding="utf-8"))
        return [folder / entry["path"] for entry in entries if entry.get("path")]
    except (OSError, ValueError, TypeError, AttributeError):
        # Whoever measured the model would have refused it.
        return []
