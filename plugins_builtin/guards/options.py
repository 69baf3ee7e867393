"""The options of guards: checked when a guard is made, before anything is loaded. A wrong one is a ``UsageError``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from invarlock.api import UsageError, nearest

FAMILIES = ("ffn", "attn", "embed", "other")
_FAMILY_OF_ROLE = {"ffn": "ffn", "attention": "attn", "embedding": "embed", "head": "embed"}
_SCOPES = {"ffn": ("ffn",), "attn": ("attn",), "all": FAMILIES}


def family_of(role: str) -> str:
    """The family of a weight's role (``invarlock.models.structure.Role``); routers are other."""
    return _FAMILY_OF_ROLE.get(role, "other")


def refuse(guard: type, options: Mapping[str, Any], retired: Mapping[str, str]) -> None:
    """Refuse options that a guard does not take, with the replacement or the nearest name.

    :param retired: advice for each option of InvarLock 0.3 that is gone, by name.
    """
    for name in options:
        if name in retired:
            raise UsageError(f"{name}: {retired[name]}")
        known = [option for option in inspect.signature(guard).parameters if option != "unknown"]
        raise UsageError(f"{name}: the guard has no such option{nearest(name, known)}; it takes {', '.join(known)}")


def families_in(scope: object) -> tuple[str, ...]:
    """The families that a ``scope`` names."""
    if scope not in _SCOPES:
        hint = "; 'all' is what was 'both'" if scope == "both" else nearest(str(scope), _SCOPES)
        raise UsageError(f"scope: {scope!r} is not one of {', '.join(_SCOPES)}{hint}")
    return _SCOPES[str(scope)]


def number(name: str, value: object, low: float, high: float = math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        bounds = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise UsageError(f"{name}: {value!r} is not a number {bounds}")
    return float(value)


def whole(name: str, value: object, low: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UsageError(f"{name}: {value!r} is not a whole number of at least {low}")
    return value


def by_family(name: str, values: object, default: float, low: float, high: float = math.inf) -> dict[str, float]:
    """A number for each family; those that are not given have the default."""
    if not isinstance(values, Mapping):
        raise UsageError(f"{name}: {values!r} is not a mapping of {', '.join(FAMILIES)} to numbers")
    for family in values:
        if family not in FAMILIES:
            hint = nearest(str(family), FAMILIES)
            raise UsageError(f"{name}: there is no family {family!r}{hint}; known are {', '.join(FAMILIES)}")
    return {family: number(f"{name}.{family}", values.get(family, default), low, high) for family in FAMILIES}
