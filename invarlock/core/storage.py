"""Storage of a model's weights: formats, bits and bytes, as the report has them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class StoredType:
    """Weights of a checkpoint that are stored in one format."""

    format: str
    """As ``BF16``, ``FP8 (E4M3), per channel`` or ``Q4_K``."""
    parameters: int
    share: float
    """Of all parameters."""
    bits_per_weight: float
    """Scales and zero points counted."""


@dataclass(frozen=True)
class Storage:
    """The weights of one checkpoint on disk."""

    file_bytes: int
    """Of the files that hold weights."""
    parameters: int
    bits_per_weight: float
    """Mean over all parameters, scales and zero points counted."""
    types: list[StoredType] = field(default_factory=list)
    """The one with the most parameters first."""
