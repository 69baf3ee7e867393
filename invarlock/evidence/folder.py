"""The files of a run against what its report says of them. Nothing outside the folder is opened."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from invarlock.checkpoints.checksums import digest_of
from invarlock.config.schema import RunConfig
from invarlock.core.errors import UsageError, one_line
from invarlock.core.paths import absolute
from invarlock.core.progress import counted
from invarlock.evidence.disagreements import ABSENT, Disagreement, differences, printable
from invarlock.reporting.report import FORMAT_VERSION, Report

REPORT = "report.json"
COPY = f"model/{REPORT}"
"""A copy of the report travels with the model; it cannot hold a digest of itself."""
ADDED = (".ending", ".inconclusive")
"""Keys of the verdict and its findings that earlier builds did not write."""


def read_report(run: Path) -> Report:
    """The report of a run.

    :raises UsageError: there is none, or it is not what the schema says.
    """
    path = run / REPORT
    try:
        # A pipe would be waited for.
        text = path.read_bytes() if path.is_file() or not path.exists() else None
    except (OSError, ValueError) as error:
        problem = f"{REPORT} cannot be read ({one_line(error)})"
        raise UsageError(f"{absolute(run)}: {problem}; give the folder of a run") from None
    if text is None:
        raise UsageError(f"{absolute(path)}: is no plain file; give the folder of a run")
    try:
        report = _report().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = printable(".".join(map(str, first["loc"])))
        raise UsageError(f"{run / REPORT}: is no {FORMAT_VERSION}: {place or 'the file'}: {first['msg']}") from None
    if absent := next(_absent(json.loads(text), report), None):
        raise UsageError(f"{run / REPORT}: is no {FORMAT_VERSION}: {absent}: Field required")
    if not report.attempts:
        raise UsageError(f"{run / REPORT}: is no {FORMAT_VERSION}: attempts: there is none")
    return report


@cache
def _report() -> TypeAdapter[Report]:
    """Made once: that takes longer than to check a report with it."""
    return TypeAdapter(Report)


def _absent(values: Any, report: Report) -> Iterator[str]:
    """Keys that a result has a default for, and a report has to hold."""
    for name, part in {"guards": report.guards, "verdict": report.verdict}.items():
        absent = [each.what for each in differences(name, values[name], part) if each.stored is ABSENT]
        yield from (printable(what) for what in absent if not what.endswith(ADDED))


def artifacts(run: Path, report: Report, config: RunConfig) -> Iterator[Disagreement]:
    """Missing, changed and added files of the model, or a model that should not be there."""
    saved = report.verdict.accepted and config.output.save_model and not report.edit.is_comparison
    if saved != bool(report.artifacts):
        yield Disagreement("artifacts", sorted(report.artifacts), "a saved model" if saved else [], how="expected")
    if not report.artifacts and (run / "model").exists():
        yield Disagreement("model", ABSENT, "a folder", how="found")
        return
    files = counted(list(_files(run)), lambda name: (run / name).lstat().st_size)
    found = {name: _digest(run / name) for name in files}
    expected = dict(report.artifacts)
    if expected:
        expected[COPY] = digest_of(run / REPORT)
    for name in sorted(found.keys() | expected.keys()):
        stored, now = expected.get(name, ABSENT), found.get(name, ABSENT)
        if stored != now:
            yield Disagreement(name, stored, now, how="found")


def _files(run: Path) -> Iterator[str]:
    """All that lies below the model's folder, which may be none itself; a link is not followed."""
    model = run / "model"
    if model.is_symlink() or model.is_file():
        yield "model"
    for folder, folders, files in os.walk(model, followlinks=False):
        for name in (*files, *(each for each in folders if (Path(folder) / each).is_symlink())):
            yield (Path(folder) / name).relative_to(run).as_posix()


def _digest(path: Path) -> str:
    if path.is_symlink() or not path.is_file():
        return "no plain file"
    return digest_of(path)
