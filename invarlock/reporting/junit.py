"""JUnit's XML: a test for each voice in the verdict, as a continuous-integration system shows them."""

from __future__ import annotations

import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence

from invarlock.core.results import Action, Finding, GuardResult
from invarlock.reporting.describing import NOT_MEASURED, action_word, deciding, evidence, most_suspect
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import Report

OUTPUTS = ("primary metric", "predictions")
MOST_CHARACTERS = 100
"""Of a message, which lists of failures show on one line; the body has all of it."""
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
    for guard in report.guards:
        yield _guard(guard, report)
    others = {found.source: found for found in report.verdict.findings if not found.is_of_guard}
    for name in dict.fromkeys([*OUTPUTS, *others]):
        found = others.get(name)
        yield _judged(found, report) if found else _case(name, "skipped", NOT_MEASURED)


def _guard(guard: GuardResult, report: Report) -> ElementTree.Element:
    found = Finding.of_guard(guard)
    if guard.passed is None:
        case = _case(found.source, "skipped", guard.message)
    else:
        case = _judged(found, report, guard.error, guard.warnings)
    if guard.seconds is not None and guard.seconds >= 0:
        case.set("time", f"{guard.seconds:.4f}")
    return case


def _judged(
    found: Finding, report: Report, error: str | None = None, warnings: Sequence[str] = ()
) -> ElementTree.Element:
    passes = found.action is Action.CONTINUE or (found.action is Action.WARN and not report.verdict.strict)
    if passes and not found.failed:
        return _case(found.source, "system-out", f"{found.action}: {found.message}")
    outcome = "error" if found.failed else "failure"
    body = "\n".join([error or found.message, *warnings, *_help(found, report)])
    kind = "inconclusive" if found.inconclusive else action_word(found.action)
    return _case(found.source, outcome, body, type=kind, message=_short(found.message))


def _help(found: Finding, report: Report) -> Iterator[str]:
    """Suspects and next steps, where the finding decided."""
    if found == deciding(report.verdict):
        yield from (f"suspect: {suspect.module} ({evidence(suspect)})" for suspect in most_suspect(report.verdict))
        yield from (f"next: {': '.join(filter(None, (step.reason, step.option)))}" for step in report.what_next)


def _short(message: str) -> str:
    """The beginning of a message, for a list of failures."""
    return textwrap.shorten(message, MOST_CHARACTERS, placeholder=" …")


def _case(source: str, outcome: str, text: str, **attributes: str) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname="invarlock", name=source)
    ElementTree.SubElement(case, outcome, attributes).text = text
    return case
