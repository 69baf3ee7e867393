"""Export of rounded weights as they are, in the model's own layout and data type."""

from __future__ import annotations

from invarlock.exporters.exporter import Exporter


class Dequantized(Exporter):
    name = "dequantized"
    mixes = True


EXPORTER = Dequantized()
