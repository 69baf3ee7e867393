"""The plan of rounding, section ``edit.plan`` of the configuration. This module imports no torch, for ``--help``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, get_args

from annotated_types import Ge, Le

from invarlock.core.errors import UsageError, nearest

Scope = Literal["ffn", "attn", "all"]
Format = Literal["int", "fp8", "mxfp4", "nvfp4"]
Scale = Literal["largest", "inputs", "fisher"]


@dataclass(frozen=True)
class FloatFormat:
    """A format of small floating-point numbers, which leaves less open than whole numbers do."""

    name: str
    bits: int
    block: int | None
    """Weights along the input axis that share a scale; None where an output channel or the tensor does."""


if TYPE_CHECKING:
    # None stands for those of the format until ``__post_init__`` has put them there: nobody sees it.
    Bits = int
else:
    Bits = Annotated[
        int | None,
        Ge(2),
        Le(8),
        "Bits per weight; null means those of the format, which are 8 for int; auto, where the plan is one scheme, "
        "searches them and the sizes of groups for edit.target.",
    ]

FLOATS = {
    "fp8": FloatFormat("FP8 (E4M3)", 8, None),
    "mxfp4": FloatFormat("MXFP4", 4, 32),
    "nvfp4": FloatFormat("NVFP4", 4, 16),
}
SCALE_BITS, BLOCK_SCALE_BITS = 16, 8
AUTO = "auto"
"""In place of bits, where they are searched."""
INTEGER_BITS = 8
"""By default."""


class PlanError(UsageError):
    """A plan that cannot be carried out; the message has its fields in backquotes, the one to change first."""


@dataclass(frozen=True)
class Scheme:
    """Rounding of a weight to a grid of numbers: ``2 ** bitwidth`` whole ones, or small floating-point ones.

    :raises PlanError: a value is outside its range, ``group_size`` is given without ``per_channel``, or ``format``
        leaves no choice.
    """

    bitwidth: Bits = None  # type: ignore[assignment]
    symmetric: Annotated[bool, "Zero point at zero; else the range is min to max with a zero point."] = True
    per_channel: Annotated[bool, "A scale for each output channel; else one for the tensor."] = True
    group_size: Annotated[
        int | None, Ge(1), "A scale for each group of so many weights along the input axis; the last may be short."
    ] = None
    clamp_ratio: Annotated[
        float, Ge(0.0), Le(0.5), "Share c of weights clipped first: to the quantiles c/2 and 1 - c/2."
    ] = 0.0
    format: Annotated[
        Format,
        "Numbers that weights are rounded to: int, whole ones times a scale; fp8, E4M3 with a scale for each output "
        "channel or the tensor; mxfp4 and nvfp4, E2M1 in blocks of 32 and 16.",
    ] = "int"
    scale: Annotated[
        Scale,
        "Scale of a group: largest, that of its largest magnitude; inputs, the share of it, 0.6 to 1, that loses least "
        "by the mean squares of the inputs, as the baseline has them on the preview windows; fisher, the share that "
        "loses least by the Fisher information on them.",
    ] = "largest"

    def __post_init__(self) -> None:
        if self.format not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise PlanError(
                f"`format` is {self.format!r}; known are {known}{nearest(str(self.format), get_args(Format))}"
            )
        if self.of_floats:
            self._settle(self.of_floats)
        elif self.bitwidth is None:
            object.__setattr__(self, "bitwidth", INTEGER_BITS)
        if self.is_searched:
            self._check_scale()
            return
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
        self._check_scale()

    def _check_scale(self) -> None:
        known = get_args(Scale)
        if self.scale not in known:
            raise PlanError(f"`scale` is {self.scale!r}; known are {', '.join(known)}{nearest(str(self.scale), known)}")
        if self.scale != "largest" and (self.of_floats or not self.symmetric or not self.per_channel):
            problem = "is for whole numbers, symmetric and per channel"
            raise PlanError(f"`scale` is {self.scale!r}, which {problem}; set it to largest")

    def _settle(self, floats: FloatFormat) -> None:
        """Take what the format leaves open from it, and refuse what contradicts it."""
        kept = {"bitwidth": floats.bits, "group_size": floats.block}
        for field, value in kept.items():
            given = getattr(self, field)
            if given not in (None, value):
                raise PlanError(f"`{field}` is {given!r}, but `format` {self.format} has {value}: set it to null")
            object.__setattr__(self, field, value)
        if not self.symmetric:
            raise PlanError(f"`symmetric` is false, but `format` {self.format} has no zero point: set it to true")
        if not self.per_channel and floats.block:
            raise PlanError(
                f"`per_channel` is false, but `format` {self.format} has a scale for each block of {floats.block}: "
                "set it to true"
            )

    @property
    def is_searched(self) -> bool:
        """True of a plan whose bits are yet to be found."""
        return False

    @property
    def of_floats(self) -> FloatFormat | None:
        """The format of floating-point numbers, or None where they are whole."""
        return FLOATS.get(self.format)

    @property
    def alone(self) -> Scheme:
        """The scheme without what it is for."""
        return Scheme(**{entry.name: getattr(self, entry.name) for entry in fields(Scheme)})

    @property
    def described(self) -> str:
        """Numbers and scales, in words."""
        grain = "per output channel" if self.per_channel else "per tensor"
        if self.of_floats:
            block = self.of_floats.block
            return f"{self.of_floats.name}, {f'blocks of {block}' if block else grain}"
        grain = f"groups of {self.group_size}" if self.group_size else grain
        scales = {"inputs": ", scales by inputs", "fisher": ", scales by Fisher information"}.get(self.scale, "")
        return f"{self.bitwidth} bits, {'symmetric' if self.symmetric else 'asymmetric'}, {grain}{scales}"

    @property
    def scale_bits(self) -> int:
        """Bits of a scale as formats store it: 8 of small blocks of floats, else 16."""
        return SCALE_BITS if self.of_floats is None or self.of_floats.block is None else BLOCK_SCALE_BITS

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
            object.__setattr__(self, name, checked_patterns(name, patterns))

    @property
    def is_searched(self) -> bool:
        return str(self.bitwidth) == AUTO


def matches(pattern: str, name: str) -> bool:
    """Match a pattern of a plan, a glob or ``re:REGEX``, against a whole name."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return fnmatchcase(name, pattern)


def checked_patterns(field: str, patterns: Sequence[str]) -> tuple[str, ...]:
    """Patterns of a field of a plan.

    :raises PlanError: there is one that is none.
    """
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_size(field: str, size: int | None) -> None:
    if size is not None and (not _is_whole(size) or size < 1):
        raise PlanError(f"`{field}` is {size!r}; set a whole number from 1 on, or null")
