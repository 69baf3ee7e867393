"""JUnit's XML: a test for each voice in the verdict, as a continuous-integration system shows them."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence

from invarlock.core.results import Action, Finding, GuardResult
from invarlock.reporting.describing import NOT_MEASURED, action_word
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import Report

OUTPUTS = ("primary metric", "predictions")
COUNTS = {"failures": "failure", "errors": "error", "skipped": "skipped"}


def render(runs: Sequence[SavedReport]) -> str:
    suites = ElementTree.Element("testsuites", name="invarlock")
    suites.extend(_suite(run) for run in runs)
    ElementTree.indent(suites, space="")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(suites, encoding="unicode")}\n'


def _suite(run: SavedReport) -> ElementTree.Element:
    cases = list(_cases(run.report))
    counts = {count: str(sum(case.find(tag) is not None for case in cases)) for count, tag in COUNTS.items()}
    suite = ElementTree.Element("testsuite", {"name": run.name, "tests": str(len(cases)), **counts})
    suite.extend(cases)
    return suite


def _cases(report: Report) -> Iterator[ElementTree.Element]:
    """The guards in their order, then the primary metric, the predictions and whatever else had a say."""
    strict = report.verdict.strict
    for guard in report.guards:
        yield _guard(guard, strict)
    others = {found.source: found for found in report.verdict.findings if not found.is_of_guard}
    for name in dict.fromkeys([*OUTPUTS, *others]):
        found = others.get(name)
        yield _judged(found, strict) if found else _case(name, "skipped", NOT_MEASURED)


def _guard(guard: GuardResult, strict: bool) -> ElementTree.Element:
    found = Finding.of_guard(guard)
    if guard.passed is None:
        case = _case(found.source, "skipped", guard.message)
    else:
        case = _judged(found, strict, guard.error)
    if guard.seconds is not None and guard.seconds >= 0:
        case.set("time", f"{guard.seconds:.4f}")
    return case


def _judged(found: Finding, strict: bool, error: str | None = None) -> ElementTree.Element:
    if not found.failed and (found.action is Action.CONTINUE or (found.action is Action.WARN and not strict)):
        return _case(found.source, "system-out", f"{found.action}: {found.message}")
    outcome = "error" if found.failed else "failure"
    kind = "inconclusive" if found.inconclusive else action_word(found.action)
    return _case(found.source, outcome, error or found.message, type=kind, message=found.message)


def _case(source: str, outcome: str, text: str, **attributes: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname="invarlock", name=source)
    ElementTree.SubElement(case, outcome, attributes).text = text
    return case
