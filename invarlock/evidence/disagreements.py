"""Disagreements of a report with what comes out again."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from invarlock.core.plain import OWN, plain

RELATIVE = 1e-9
"""Floats that differ by less agree: sums and exponentials are not the same to the last bit on every processor."""
LONGEST = 400

ABSENT: Final = object()
"""Stands for a value that one side lacks."""


@dataclass(frozen=True)
class Disagreement:
    """One place of a report or of a folder, what is stored there and what was found instead."""

    what: str
    stored: Any
    found: Any
    how: str = "recomputed"

    def __str__(self) -> str:
        return f"{printable(self.what)}: stored {_shown(self.stored)}, {self.how} {_shown(self.found)}"


def differences(what: str, stored: Any, found: Any) -> Iterator[Disagreement]:
    """Each value that differs, by its place below ``what``; both sides are compared as JSON would hold them."""
    return _differing(what, plain(stored, OWN), plain(found, OWN))


def of_attributes(what: str, stored: Any, found: Mapping[str, Any]) -> Iterator[Disagreement]:
    """Each attribute of a part of a report that differs."""
    return differences(what, {name: getattr(stored, name) for name in found}, found)


def printable(text: str) -> str:
    """Text of a stranger as it can be printed: nothing in it steers a terminal."""
    return json.dumps(text)[1:-1].replace('\\"', '"')


def _differing(what: str, stored: Any, found: Any) -> Iterator[Disagreement]:
    if isinstance(stored, dict) and isinstance(found, dict):
        for key in dict.fromkeys([*stored, *found]):
            yield from _differing(f"{what}.{key}", stored.get(key, ABSENT), found.get(key, ABSENT))
    elif isinstance(stored, list) and isinstance(found, list) and len(stored) == len(found):
        for place, (one, other) in enumerate(zip(stored, found, strict=True)):
            yield from _differing(f"{what}[{place}]", one, other)
    elif not _agree(stored, found):
        yield Disagreement(what, stored, found)


def _agree(stored: Any, found: Any) -> bool:
    if isinstance(stored, float) and isinstance(found, float):
        return math.isclose(stored, found, rel_tol=RELATIVE, abs_tol=RELATIVE)
    return bool(stored == found) and isinstance(stored, bool) == isinstance(found, bool)


def _shown(value: Any) -> str:
    if value is ABSENT:
        return "nothing"
    text = json.dumps(plain(value, OWN))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
