"""Formats in which an accepted model is saved: one module each."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from invarlock import hookimpl


class BuiltIn:
    """An exporter that is ``EXPORTER`` of a module here, which is imported once more than its name is asked for."""

    def __init__(self, name: str, module: str) -> None:
        self.name, self._module = name, module

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(f"{__name__}.{self._module}").EXPORTER, attribute)


@hookimpl
def invarlock_exporters() -> list[BuiltIn]:
    return [
        BuiltIn("compressed-tensors", "compressed_tensors"),
        BuiltIn("dequantized", "dequantized"),
        BuiltIn("gguf", "gguf"),
    ]
