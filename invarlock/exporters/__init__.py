"""Formats in which an accepted model is saved: one module each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from invarlock import hookimpl


class BuiltIn:
    """An exporter that is ``EXPORTER`` of a module here, which is imported once more than its name is asked for."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(f"{__name__}.{self.name.replace('-', '_')}").EXPORTER, attribute)


@hookimpl
def invarlock_exporters() -> list[BuiltIn]:
    return [BuiltIn(name) for name in ("compressed-tensors", "dequantized", "gguf")]
