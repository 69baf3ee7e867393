"""Formats in which an accepted model is saved: one module each."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from invarlock.exporters.exporter import Exporter

BUILT_IN = {
    "compressed-tensors": "compressed_tensors",
    "dequantized": "dequantized",
    "gguf": "gguf",
}
"""Where each format's ``EXPORTER`` is: by name, for a configuration is checked without torch."""


def built_in() -> tuple[Exporter, ...]:
    return tuple(import_module(f"{__name__}.{module}").EXPORTER for module in BUILT_IN.values())
