"""The plan of rounding, section ``edit.plan`` of the configuration. This module imports no torch, for ``--help``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Le

from invarlock.core.errors import UsageError, nearest

Scope = Literal["ffn", "attn", "all"]


class PlanError(UsageError):
    """A plan that cannot be carried out; the message has its fields in backquotes, the one to change first."""


@dataclass(frozen=True)
class Scheme:
    """Rounding of a weight to a grid of ``2 ** bitwidth`` numbers.

    :raises PlanError: a value is outside its range, or ``group_size`` is given without ``per_channel``.
    """

    bitwidth: Annotated[int, Ge(2), Le(8), "Bits a weight."] = 8
    symmetric: Annotated[bool, "Zero point at zero; else the range is min to max with a zero point."] = True
    per_channel: Annotated[bool, "A scale for each output channel; else one for the tensor."] = True
    group_size: Annotated[
        int | None, Ge(1), "A scale for each group of so many weights along the input axis; the last may be short."
    ] = None
    clamp_ratio: Annotated[
        float, Ge(0.0), Le(0.5), "Share c of weights clipped first: to the quantiles c/2 and 1 - c/2."
    ] = 0.0

    def __post_init__(self) -> None:
        if not _is_whole(self.bitwidth) or not 2 <= self.bitwidth <= 8:
            raise PlanError(f"`bitwidth` is {self.bitwidth!r}; set a whole number from 2 to 8")
        _check_size("group_size", self.group_size)
        if self.group_size is not None and not self.per_channel:
            raise PlanError(
                f"`group_size` is {self.group_size} but `per_channel` is false; groups lie inside an output channel: "
                "set per_channel to true or group_size to null"
            )
        if not isinstance(self.clamp_ratio, int | float) or not 0 <= self.clamp_ratio <= 0.5:
            raise PlanError(f"`clamp_ratio` is {self.clamp_ratio!r}; set a number from 0 to 0.5")

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code: ``-2 ** (bitwidth - 1)`` and ``2 ** (bitwidth - 1) - 1``."""
        return -(2 ** (self.bitwidth - 1)), 2 ** (self.bitwidth - 1) - 1

    @property
    def levels(self) -> float:
        """Divisor that makes a scale of the largest magnitude, or, asymmetric, of the range: steps between codes."""
        steps = 2**self.bitwidth - 1
        return steps / 2 if self.symmetric else float(steps)


@dataclass(frozen=True)
class Plan(Scheme):
    """A scheme, and the weights of a model that are rounded by it.

    Patterns are globs (``*.mlp.*``, case matters, ``*`` crosses dots) or ``re:`` with a regular expression that matches
    the whole name; a name is that of a module or of a parameter.

    :raises PlanError: also for an unknown scope, a pattern that is none, ``max_modules`` below 1.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    scope: Annotated[Scope, "Weights to quantize, by what their module is."] = "ffn"
    include: Annotated[
        tuple[str, ...],
        "Globs or re:REGEX of module names. Only what matches is quantized; embeddings, output heads and routers "
        "are touched only if a pattern here matches them.",
    ] = ()
    exclude: Annotated[tuple[str, ...], "Globs or re:REGEX of module names to leave alone."] = ()
    max_modules: Annotated[int | None, Ge(1), "At most so many modules, the first ones."] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        scopes = get_args(Scope)
        if self.scope not in scopes:
            known = ", ".join(scopes)
            raise PlanError(f"`scope` is {self.scope!r}; known are {known}{nearest(str(self.scope), scopes)}")
        _check_size("max_modules", self.max_modules)
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            object.__setattr__(self, name, _patterns(name, patterns))


def matches(pattern: str, name: str) -> bool:
    """Match a pattern of a plan, a glob or ``re:REGEX``, against a whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return fnmatchcase(name, pattern)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(field: str, size: int | None) -> None:
    if size is not None and (not _is_whole(size) or size < 1):
        raise PlanError(f"`{field}` is {size!r}; set a whole number from 1 on, or null")


def _patterns(field: str, patterns: Sequence[str]) -> tuple[str, ...]:
    # A lone string is a sequence too, of patterns with one letter each: never what was meant.
    if isinstance(patterns, str):
        raise PlanError(f"`{field}` is the text {patterns!r}; set a list of patterns: [{patterns!r}]")
    patterns = tuple(patterns)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise PlanError(f"`{field}` holds {pattern!r}; a pattern is text, a glob or re:REGEX")
        try:
            matches(pattern, "")
        except re.error as error:
            raise PlanError(f"`{field}` holds {pattern!r}, which is no regular expression: {error}") from error
    return patterns
