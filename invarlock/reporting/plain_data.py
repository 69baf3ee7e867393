"""Access to plain data that may lack anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """A value that may be there, and of the type that is asked for, or else counts as not there."""

    value: Any

    def __getitem__(self, key: str) -> Node:
        return Node(self.value.get(key) if isinstance(self.value, Mapping) else None)

    def __bool__(self) -> bool:
        return bool(self.value)

    def entries(self) -> list[Node]:
        return [Node(entry) for entry in self.value] if isinstance(self.value, list | tuple) else []

    def items(self) -> list[tuple[str, Node]]:
        if not isinstance(self.value, Mapping):
            return []
        return [(key, Node(entry)) for key, entry in self.value.items()]

    def text(self, default: str = "") -> str:
        """Text; a number as it is written, anything else the default."""
        if isinstance(self.value, bool) or not isinstance(self.value, str | int | float):
            return default
        return str(self.value)

    def number(self) -> float | None:
        """A number, not finite ones, which a report holds as ``"nan"`` and ``"inf"``, among them."""
        if isinstance(self.value, bool) or not isinstance(self.value, int | float | str):
            return None
        try:
            return float(self.value)
        except (ValueError, OverflowError):
            return None

    def whole(self) -> int | None:
        """A count, of what fits into 64 bits."""
        is_whole = isinstance(self.value, int) and not isinstance(self.value, bool)
        return self.value if is_whole and abs(self.value) < 2**63 else None

    def flag(self) -> bool | None:
        return self.value if isinstance(self.value, bool) else None
