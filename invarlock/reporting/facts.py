"""Facts at the head of a report: when and how it was made, of what, and how large that is."""

from __future__ import annotations

from invarlock.reporting.describing import (
    NOT_MEASURED,
    STORED_BITS,
    Measure,
    bits_per_parameter,
    edit_line,
    measures,
    model_line,
    reference_line,
    shown,
    shown_bytes,
    storage_line,
)
from invarlock.reporting.plain_data import Node
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import MetricsSection, Report

NOT_SAVED = "not saved"


def facts(run: SavedReport) -> list[tuple[str, str]]:
    report, verdict = run.report, run.report.verdict
    found = [
        ("when", report.created),
        ("command", report.command),
        ("model", model_line(report.model)),
        ("edit", edit_line(report.edit)),
        ("size", size_line(report)),
        ("saved", saved_line(run)),
        ("rests on", verdict.rests_on),
    ]
    if report.reference is not None:
        found.append(("baseline's pass", reference_line(report.reference)))
    if report.metrics.noise is not None:
        found.append(("noise", report.metrics.noise.message))
    if report.model.restored is not None:
        found.append(("baseline", "restored bit for bit" if report.model.restored else "NOT RESTORED"))
    if verdict.exit_code is not None:
        found.append(("exit status", f"{verdict.exit_code}{', with --strict' if verdict.strict else ''}"))
    return [(name, text) for name, text in found if text and text != "unknown"]


def size_line(report: Report) -> str:
    """The weights before and after the edit: as they are stored, or as the plan has them, scales not counted."""
    if report.storage.after:
        return storage_line(report.storage)
    description = Node(report.model.description)
    before, parameters = STORED_BITS.get(description["dtype"].text()), description["parameters"].whole()
    after = bits_per_parameter(report)
    if before is None or parameters is None or after is None:
        return NOT_MEASURED
    sizes = [
        f"{shown_bytes(int(parameters * bits / 8))} ({shown(bits, 'bits')} per parameter)" for bits in (before, after)
    ]
    return f"{' before, '.join(sizes)} after, scales not counted"


def saved_line(run: SavedReport) -> str:
    """The size of the saved artifacts."""
    nothing = Node(run.values)["artifacts"].value == {}
    return NOT_SAVED if nothing else shown_bytes(run.saved_bytes)


def limited(metrics: MetricsSection) -> list[Measure]:
    """Figures that are held against a limit."""
    return [measure for measure in measures(metrics) if measure.limit]


def unlimited(metrics: MetricsSection) -> list[Measure]:
    return [measure for measure in measures(metrics) if not measure.limit]


def broken(metrics: MetricsSection) -> list[Measure]:
    """Figures beyond their limits."""
    return [measure for measure in measures(metrics) if measure.within is False]
