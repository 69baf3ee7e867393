"""Promises that every guard has to keep, whatever it looks at."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

from invarlock import hookimpl
from invarlock.core.results import Action, GuardResult
from invarlock.testing.architectures import ARCHITECTURES, tiny_model
from invarlock.testing.keeping import live_weights
from invarlock.testing.named_edits import damage
from invarlock.testing.running import GuardRun


def check_guard(guard: Any, /, **options: Any) -> None:
    """Hold a guard to what every guard owes, on a tiny model of every architecture, in the real pipeline.

    It passes the unedited model, in float32 and bfloat16, with tied and untied embeddings, and with experts; it does
    not change the model; the same run gives the same result; what it returns is plain enough for JSON; and to a weight
    that holds NaN or infinity, before or after the edit, it gives an answer, whichever, and raises nothing. It keeps no
    live weights from ``prepare``: the edit happens in place, so that it would compare the edited model with itself.

    :param guard: a class with ``Guard`` as base, an instance of one, or a module or object with hook functions.
    :param options: the guard's options.
    :raises AssertionError: with a line for each promise that is broken.
    :raises UsageError: the guard's hooks are wrong.
    """
    broken = list(_broken_promises(guard, options))
    if broken:
        name = getattr(guard, "__name__", None) or type(guard).__name__
        raise AssertionError("\n".join([f"{name} does not keep what a guard owes:", *(f"- {line}" for line in broken)]))


def _broken_promises(guard: Any, options: Mapping[str, Any]) -> Iterator[str]:
    for architecture in ARCHITECTURES:
        returned = _Returned()
        session = GuardRun(guard, tiny_model(architecture), options, {"returned": returned})
        returned.session = session
        for said in [*_broken_in(session), *dict.fromkeys(returned.problems)]:
            yield f"{architecture}: {said}"


def _broken_in(session: GuardRun) -> Iterator[str]:
    model, first = session.model, session.judge()
    yield from _objections(first, "the unedited model")
    if session.judge() != first:
        yield "the same run gives another result"
    yield from _failures(session.judge("with one NaN"), "with NaN after the edit")
    model.to(torch.bfloat16)
    yield from _objections(session.judge(), "the unedited model in bfloat16")
    damage(model, "overflown")(model)
    yield from _failures(session.judge(), "with infinity before the edit")


def _objections(result: GuardResult, to: str) -> Iterator[str]:
    if result.error:
        yield f"it fails on {to}: {result.message}"
    elif not result.passed or result.action is not Action.CONTINUE:
        yield f"it does not pass {to}: {result.action}: {result.message}"


def _failures(result: GuardResult, where: str) -> Iterator[str]:
    if result.error:
        yield f"it fails {where}: {result.message}"


class _Returned:
    """A wrapper around the guard that notes what of its answers JSON cannot hold, and what it keeps of the model."""

    session: GuardRun

    def __init__(self) -> None:
        self.problems: list[str] = []

    @hookimpl(wrapper=True)
    def invarlock_prepare(self, model: torch.nn.Module) -> Generator[None, Any, Any]:
        returned = yield from self._noted("prepare")
        if kept := next(live_weights(self.session.instance, model), None):
            self.problems.append(
                f"it keeps live weights from prepare ({kept}), which the edit will change: clone() them"
            )
        return returned

    @hookimpl(wrapper=True)
    def invarlock_validate(self) -> Generator[None, Any, Any]:
        return (yield from self._noted("validate"))

    def _noted(self, where: str) -> Generator[None, Any, Any]:
        returned = yield
        try:
            json.dumps(returned)
        except (TypeError, ValueError) as error:
            self.problems.append(f"what {where} returns is not plain: {error}")
        return returned
