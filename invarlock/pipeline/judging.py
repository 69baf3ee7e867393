"""A judgement: attempts of an edit until one is accepted, the report of them, and the output."""

from __future__ import annotations

import time
from dataclasses import replace

from invarlock.core.plain import OWN, plain
from invarlock.core.results import Action
from invarlock.pipeline.attempts import Attempt, Edited, Editor, RunResult
from invarlock.pipeline.attribution import attribute
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Watched
from invarlock.pipeline.report_builder import assemble, finish


def judge(guarding: Guarding, editor: Editor, baseline: Watched) -> RunResult:
    """Attempt an edit until one aborts, or the editor has no other plan; report, and write.

    :param baseline: the model as it has to be where no attempt is made: unless all guards are ready.
    """
    if guarding.ready:
        attempts, edited = _attempts(guarding, editor)
        attribution = attribute(guarding, edited, attempts[-1].metrics)
        left = edited.watched if attempts[-1].verdict.accepted else editor.undo()
    else:
        attempts, left, attribution = [_announced(guarding, guarding.not_ready(editor.plan))], baseline, None
    report = assemble(guarding, attempts, editor, before=baseline, after=left, attribution=attribution)
    finish(report, guarding.session)
    guarding.confirm(left)
    editor.write(report)
    guarding.session.ranks.gather(None)
    return RunResult(report, editor.model, attempts[-1].verdict)


def _attempts(guarding: Guarding, editor: Editor) -> tuple[list[Attempt], Edited]:
    """The attempts, and what the last one made, which is still there."""
    attempts: list[Attempt] = []
    while True:
        began, number = time.monotonic(), len(attempts) + 1
        edited = editor.apply(number)
        attempt = replace(guarding.judge(edited, number), seconds=round(time.monotonic() - began, 2))
        attempts.append(_announced(guarding, attempt))
        if attempt.verdict.action is Action.ABORT or not editor.revise(attempts):
            return attempts, edited


def _announced(guarding: Guarding, attempt: Attempt) -> Attempt:
    """Tell plugins of an attempt whose verdict is folded, in the first process; hands it on.

    :raises PluginError: a plugin failed.
    """

    def tell() -> None:
        parts = plain(attempt, OWN)
        guarding.session.plugins.attempt_finished(parts.pop("number"), parts)

    guarding.session.ranks.from_first(tell)
    return attempt
