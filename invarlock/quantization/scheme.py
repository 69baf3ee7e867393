"""How numbers are rounded, and what a plan asks for. Imports no torch, so that a config can be checked without it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from invarlock.core.errors import UsageError, nearest

SCOPES = ("ffn", "attn", "all")
"""What ``Plan.scope`` may be; ``all`` is attention and feed-forward."""


@dataclass(frozen=True)
class Scheme:
    """How a weight is rounded to a grid of ``2 ** bitwidth`` numbers.

    :raises UsageError: a value is outside its range, or ``group_size`` is given without ``per_channel``.
    """

    bitwidth: int = 8
    """Bits per code, 2 to 8."""
    symmetric: bool = True
    """Whether zero is in the middle of the grid; otherwise the grid spans from the smallest to the largest weight."""
    per_channel: bool = True
    """Whether every output channel has a scale of its own; otherwise a whole matrix shares one."""
    group_size: int | None = None
    """With a size, every group of that many inputs of an output channel has a scale; the last may be short."""
    clamp_ratio: float = 0.0
    """The share c of a matrix, 0 to 0.5, that is first clipped to its quantiles c/2 and 1 - c/2."""
    half_scales: bool = False
    """Whether scales are rounded to float16, for a format that stores no other; else they are to the weight's dtype."""

    def __post_init__(self) -> None:
        if not _is_whole(self.bitwidth) or not 2 <= self.bitwidth <= 8:
            raise UsageError(f"edit.plan.bitwidth is {self.bitwidth!r}; set a whole number from 2 to 8")
        if self.group_size is not None and (not _is_whole(self.group_size) or self.group_size < 1):
            raise UsageError(f"edit.plan.group_size is {self.group_size!r}; set a whole number from 1 on, or null")
        if self.group_size is not None and not self.per_channel:
            raise UsageError(
                f"edit.plan.group_size is {self.group_size} but edit.plan.per_channel is false; groups lie inside an "
                "output channel: set per_channel to true or group_size to null"
            )
        if not isinstance(self.clamp_ratio, int | float) or not 0 <= self.clamp_ratio <= 0.5:
            raise UsageError(f"edit.plan.clamp_ratio is {self.clamp_ratio!r}; set a number from 0 to 0.5")

    @property
    def code_range(self) -> tuple[int, int]:
        """The smallest and the largest code: ``-2 ** (bitwidth - 1)`` and ``2 ** (bitwidth - 1) - 1``."""
        return -(2 ** (self.bitwidth - 1)), 2 ** (self.bitwidth - 1) - 1


@dataclass(frozen=True)
class Plan:
    """Which weights of a model are rounded, and how.

    Patterns are globs (``*.mlp.*``, case matters, ``*`` crosses dots) or ``re:`` with a regular expression that matches
    the whole name; a name is that of a module or of a parameter.

    :raises UsageError: an unknown scope, a pattern that is none, ``max_modules`` below 1.
    """

    scheme: Scheme = field(default_factory=Scheme)
    scope: str = "ffn"
    """``ffn``, ``attn`` or ``all``."""
    include: tuple[str, ...] = ()
    """Only weights that match one of these; the only way to embeddings, output heads, routers and others."""
    exclude: tuple[str, ...] = ()
    """No weight that matches one of these."""
    max_modules: int | None = None
    """Only the first so many of the weights that remain, in the order of the model."""

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            known = ", ".join(SCOPES)
            raise UsageError(f"edit.plan.scope is {self.scope!r}; known are {known}{nearest(str(self.scope), SCOPES)}")
        if self.max_modules is not None and (not _is_whole(self.max_modules) or self.max_modules < 1):
            raise UsageError(f"edit.plan.max_modules is {self.max_modules!r}; set a whole number from 1 on, or null")
        for key in ("include", "exclude"):
            patterns = getattr(self, key)
            # A lone string is a sequence too, of patterns with one letter each: never what was meant.
            if isinstance(patterns, str):
                raise UsageError(f"edit.plan.{key} is the text {patterns!r}; set a list of patterns: [{patterns!r}]")
            object.__setattr__(self, key, tuple(patterns))
            for pattern in getattr(self, key):
                _check_pattern(key, pattern)


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern of a plan, a glob or ``re:REGEX``, matches a whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return fnmatchcase(name, pattern)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_pattern(key: str, pattern: object) -> None:
    if not isinstance(pattern, str):
        raise UsageError(f"edit.plan.{key} holds {pattern!r}; a pattern is text, a glob or re:REGEX")
    try:
        matches(pattern, "")
    except re.error as error:
        raise UsageError(f"edit.plan.{key} holds {pattern!r}, which is no regular expression: {error}") from error
