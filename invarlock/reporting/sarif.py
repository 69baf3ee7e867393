"""SARIF 2.1.0 (OASIS 2020): what objects to the edit, and the suspects, as results of a static analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from invarlock import __version__
from invarlock.core.errors import ExitCode
from invarlock.core.results import Finding, SuspectedModule, Verdict
from invarlock.reporting.describing import action_word, deciding, edit_line, model_line
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import to_json

RULES = {
    "objection": "A guard, the primary metric or the predictions objected to the edit",
    "suspect": "A module that is most likely responsible for the rejection",
}


def render(runs: Sequence[SavedReport]) -> str:
    """A log with a run for each report."""
    return to_json(
        {
            "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
            "version": "2.1.0",
            "runs": [_run(run, place) for place, run in enumerate(runs, start=1)],
        }
    )


def _run(run: SavedReport, place: int) -> dict[str, Any]:
    verdict = run.report.verdict
    rules = [{"id": key, "shortDescription": {"text": text}} for key, text in RULES.items()]
    objections = [_objection(finding, verdict) for finding in verdict.findings if finding.objects]
    model, edit = model_line(run.report.model), edit_line(run.report.edit)
    return {
        "tool": {"driver": {"name": "InvarLock", "semanticVersion": __version__, "rules": rules}},
        "automationDetails": {"id": f"invarlock/{place}-{run.name}/"},
        "properties": {"verdict": action_word(verdict.action), "model": model, "edit": edit},
        "results": [*objections, *(_suspicion(suspect) for suspect in verdict.suspects)],
    }


def _objection(finding: Finding, verdict: Verdict) -> dict[str, Any]:
    """An error where it decided that the process fails, else a warning."""
    text = f"{finding.source}: {action_word(finding.action)}: {finding.message}"
    level = "error" if finding == deciding(verdict) and verdict.exit_code != ExitCode.ACCEPTED else "warning"
    return _result("objection", level, text, finding.source, "function")


def _suspicion(suspect: SuspectedModule) -> dict[str, Any]:
    text = f"{suspect.module}: {'; '.join(suspect.evidence) or 'suspected'}"
    return _result("suspect", "warning", text, suspect.module, "module")


def _result(rule: str, level: str, text: str, name: str, kind: str) -> dict[str, Any]:
    """A viewer of code wants a file: it is the report, whose first line stands for the whole."""
    physical = {"artifactLocation": {"uri": "report.json"}, "region": {"startLine": 1}}
    return {
        "ruleId": rule,
        "level": level,
        "message": {"text": text},
        "locations": [{"physicalLocation": physical, "logicalLocations": [{"fullyQualifiedName": name, "kind": kind}]}],
        "partialFingerprints": {"invarlock/v1": f"{rule}:{name}"},
    }
