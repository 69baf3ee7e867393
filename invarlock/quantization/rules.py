"""A plan as a list of rules in order, ``edit.plan`` of the configuration. This module imports no torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, ClassVar

from invarlock.quantization.scheme import Plan, PlanError, Scheme, checked_patterns


@dataclass(frozen=True)
class Rule(Scheme):
    """A scheme, and the weights that it is for, or that are left alone.

    :raises PlanError: also for no pattern, a pattern that is none, or a scheme beside ``keep``.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    match: Annotated[
        tuple[str, ...],
        "Glob or re:REGEX of module names, or a list of them; the first rule that matches decides, and what none "
        "matches is left alone. A pattern that matches attention or feed-forward weights takes no embedding, output "
        "head or router along: these have a pattern of their own.",
    ] = ()
    keep: Annotated[bool, "Leave what matches as it is; no scheme beside it."] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "match", checked_patterns("match", self.match))
        if not self.match:
            raise PlanError("`match` holds no pattern; set a glob or re:REGEX of module names")
        if not self.keep:
            super().__post_init__()
            return
        for field in dataclasses.fields(Scheme):
            given = getattr(self, field.name)
            if given != field.default:
                raise PlanError(f"`{field.name}` is {given!r}, but `keep` leaves what matches as it is; remove one")

    @property
    def described(self) -> str:
        return "left alone" if self.keep else super().described


@dataclass(frozen=True)
class Rules:
    """Rules of which the first that matches a weight decides on it.

    :raises PlanError: there is none.
    """

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise PlanError("the list of rules is empty; give one at least, or a mapping")

    is_searched: ClassVar = False

    @property
    def schemes(self) -> tuple[Rule, ...]:
        """Rules that round."""
        return tuple(rule for rule in self.rules if not rule.keep)

    @property
    def described(self) -> str:
        """Numbers and scales of each rule, in words."""
        return "; ".join(dict.fromkeys(rule.described for rule in self.schemes))


AnyPlan = Plan | Rules
