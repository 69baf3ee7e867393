"""The import path that ``docs/compatibility.md`` promises: ``from invarlock.core.api import Guard``."""

from __future__ import annotations

from invarlock.plugins.classes import Guard, ModelAdapter, OptionNotTakenError

__all__ = ["Guard", "ModelAdapter", "OptionNotTakenError"]
