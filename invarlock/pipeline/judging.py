"""A judgement: attempts of an edit until one is accepted, and the report of them, made sure of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from invarlock.core.results import Action
from invarlock.pipeline.attempts import Attempt, Edit
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Watched
from invarlock.pipeline.report_builder import announced


@dataclass(frozen=True)
class Judgement:
    """The attempts of an edit, and the model that the last one left."""

    attempts: Sequence[Attempt]
    left: Watched

    @property
    def last(self) -> Attempt:
        return self.attempts[-1]


def judge(guarding: Guarding, edit: Edit, baseline: Watched, *, ready: bool) -> Judgement:
    """Attempt an edit until one attempt is accepted, one aborts, or there are none left.

    :param baseline: the model as it has to be where no attempt is made.
    :param ready: whether all guards are.
    """
    if not ready:
        return Judgement([announced(guarding, guarding.not_ready())], baseline)
    attempts: list[Attempt] = []
    for number in range(1, edit.attempts + 1):
        edited = edit.apply(number)
        attempts.append(announced(guarding, guarding.judge(edited, number)))
        left, verdict = edited.watched, attempts[-1].verdict
        if verdict.accepted:
            break
        left = edit.undo()
        if verdict.action is Action.ABORT:
            break
    return Judgement(attempts, left)
