"""SARIF 2.1.0 (OASIS 2020): what objects to the edit, and the suspects, as results of a static analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from invarlock import __version__
from invarlock.reporting.view import Finding, Suspect, View

LEVELS = {"continue": "none", "warn": "warning", "rollback": "error", "abort": "error", "unknown": "error"}
RULES = {
    "objection": "A guard, the primary metric or the predictions objected to the edit",
    "suspect": "A module that is most likely responsible for the rejection",
}


def sarif_log(views: Sequence[View]) -> dict[str, Any]:
    """A log with a run for each report."""
    return {
        "$schema": "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json",
        "version": "2.1.0",
        "runs": [_run(view, place) for place, view in enumerate(views, start=1)],
    }


def _run(view: View, place: int) -> dict[str, Any]:
    rules = [{"id": key, "shortDescription": {"text": text}} for key, text in RULES.items()]
    objections = [_objection(finding) for finding in view.verdict.findings if finding.objects]
    return {
        "tool": {"driver": {"name": "InvarLock", "semanticVersion": __version__, "rules": rules}},
        "automationDetails": {"id": f"invarlock/{place}-{view.name}/"},
        "properties": {"verdict": view.verdict.action, "model": view.model, "edit": view.edit},
        "results": [*objections, *(_suspicion(suspect) for suspect in view.verdict.suspects)],
    }


def _objection(finding: Finding) -> dict[str, Any]:
    text = f"{finding.source}: {finding.action}: {finding.message}"
    return _result("objection", LEVELS[finding.action], text, finding.source, "function")


def _suspicion(suspect: Suspect) -> dict[str, Any]:
    text = f"{suspect.module}: {'; '.join(suspect.evidence)}"
    return _result("suspect", "error", text, suspect.module, "module")


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
