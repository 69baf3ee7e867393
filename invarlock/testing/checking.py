"""What every guard owes, whatever it looks at."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import torch

from invarlock import hookimpl
from invarlock.core.results import Action, GuardResult
from invarlock.testing.architectures import ARCHITECTURES, tiny_model
from invarlock.testing.named_edits import damage
from invarlock.testing.running import Session


def check_guard(guard: Any, **options: Any) -> None:
    """Hold a guard to what every guard owes, on a tiny model of every architecture, in the real pipeline.

    It passes the unedited model, in float32 and bfloat16, with tied and untied embeddings, and with experts; it does
    not change the model; the same run gives the same result; what it returns is plain enough for JSON; and to a weight
    that holds NaN or infinity, before or after the edit, it gives an answer, whichever, and raises nothing.

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
        for dtype in (torch.float32, torch.bfloat16):
            returned = _Returned()
            model = tiny_model(architecture).to(dtype)
            session = Session(guard, model, options, {"returned": returned})
            where = f"{architecture}, {str(dtype).removeprefix('torch.')}"
            first = session.judge()
            yield from (f"{where}: {said}" for said in _of_the_unedited(first))
            yield from (f"{where}: {said}" for said in returned.problems)
            if dtype == torch.float32:
                if session.judge() != first:
                    yield f"{where}: the same run gives another result"
                yield from (f"{where}: {said}" for said in _of_what_is_not_finite(session))


def _of_the_unedited(result: GuardResult) -> Iterator[str]:
    if result.error:
        yield f"it fails on the unedited model: {result.message}"
    elif not result.passed or result.action is not Action.CONTINUE:
        yield f"it does not pass the unedited model: {result.action}: {result.message}"


def _of_what_is_not_finite(session: Session) -> Iterator[str]:
    found = {"after": session.judge(damage(session.model, "with one NaN"))}
    damage(session.model, "overflown")(session.model)
    found["before"] = session.judge()
    for when, result in found.items():
        if result.error:
            yield f"with a weight that is not finite {when} the edit it fails: {result.message}"


class _Returned:
    """A wrapper around the guard that notes what of its answers JSON cannot hold."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    @hookimpl(wrapper=True)
    def invarlock_prepare(self) -> Generator[None, Any, Any]:
        return (yield from self._noted("prepare"))

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
