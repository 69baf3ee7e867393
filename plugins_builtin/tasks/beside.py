"""Files that lie beside a model's weights, and that transformers does not load with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from invarlock.api import InputError
from plugins_builtin.adapters.locating import folder_of


def folder_beside(model: Any) -> Path | None:
    """The folder of the checkpoint that a model came from, in a hub's cache too; None where there is none."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return folder_of(name, {}) if name else None
    except InputError:
        # A model of somebody's own that only bears a name.
        return None
