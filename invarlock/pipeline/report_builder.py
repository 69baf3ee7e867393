"""The report builder: attempts put into one report."""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from invarlock import __version__
from invarlock.checkpoints.storage import storage_of
from invarlock.core.results import EditedWeight
from invarlock.models.facts import own_code_of
from invarlock.pipeline.attempts import Attempt, Editor
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Watched
from invarlock.pipeline.session import Session
from invarlock.reporting.next_steps import next_steps
from invarlock.reporting.report import (
    AttemptSection,
    AttributionSection,
    EditSection,
    ModelSection,
    Report,
    StorageSection,
)


def assemble(
    guarding: Guarding,
    attempts: Sequence[Attempt],
    editor: Editor,
    *,
    before: Watched,
    after: Watched,
    attribution: AttributionSection | None = None,
) -> dict[str, Any]:
    """The report as ``report.json`` holds it; the last attempt is the one that stands.

    :param before: the baseline.
    :param after: the model that is left.
    """
    last, config = attempts[-1], guarding.config.as_dict()
    edit = _edit(editor, last)
    parameters = editor.model.parameters() if editor.model is not None else ()
    restored = None if last.verdict.accepted or edit.is_comparison else after.digest == before.digest
    report = Report(
        invarlock_version=__version__,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        config=config,
        config_sha256=config_digest(config),
        model=ModelSection(
            id=guarding.config.model.id,
            adapter=guarding.baseline.adapter.name,
            devices=sorted({str(parameter.device) for parameter in parameters}),
            description=dict(guarding.baseline.description),
            fingerprint_before=before.digest,
            fingerprint_after=after.digest,
            restored=restored,
            streamed=before.streamed,
            own_code=_own_code(guarding, editor),
        ),
        edit=edit,
        guards=last.guards,
        metrics=last.metrics,
        coverage=last.coverage,
        storage=StorageSection(
            storage_of(Path(guarding.config.model.id)),
            storage_of(Path(edit.plan["subject"])) if edit.is_comparison else None,
        ),
        verdict=last.verdict,
        attempts=[_summary(attempt) for attempt in attempts],
        timings=guarding.session.clock.timings(),
        environment={
            "python": platform.python_version(),
            "platform": platform.platform(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
        },
        search=editor.search,
        attribution=attribution,
        command=guarding.session.invocation.command,
    )
    return replace(report, what_next=next_steps(report)).as_dict()


def finish(report: dict[str, Any], session: Session) -> None:
    """Let plugins look at the report and add to it, in the first process.

    :raises PluginError: one of them failed.
    """

    def add() -> None:
        report["extra"] |= session.plugins.run_finished(report)
        report["sections"] = [asdict(section) for section in session.plugins.report_sections(report)]

    session.ranks.from_first(add)


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a configuration as the report holds it, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def families(changes: Iterable[EditedWeight]) -> list[dict[str, Any]]:
    """Changes summed by family: how many weights of each were changed in which way.

    A family is the same weight of every layer: a name with its numbers left out.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for change in changes:
        counts[re.sub(r"\d+", "*", change.name)][change.kind] += 1
    return [{"family": family, "changes": dict(changes_of_it)} for family, changes_of_it in counts.items()]


def _edit(editor: Editor, last: Attempt) -> EditSection:
    changed = sum(weight.parameters for weight in last.modules if weight.is_changed)
    edit = EditSection(editor.name, dict(last.plan), list(last.modules), changed)
    if edit.is_comparison:
        edit.plan["families"] = families(last.modules)
    return edit


def _own_code(guarding: Guarding, editor: Editor) -> list[str]:
    files = [guarding.baseline.own_code, own_code_of(editor.model)]
    return sorted({file for file in files if file})


def _summary(attempt: Attempt) -> AttemptSection:
    verdict, metric = attempt.verdict, attempt.metrics.primary
    ratio, figure = (metric.ratio, metric.figure) if metric else (None, None)
    return AttemptSection(
        attempt.number,
        attempt.bitwidth,
        verdict.action,
        verdict.decided_by,
        ratio,
        figure,
        None if "subject" in attempt.plan else dict(attempt.plan),
        attempt.bits_per_weight,
        attempt.seconds,
    )
