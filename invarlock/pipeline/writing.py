"""A finished report on its way to disk, with the model, the page and the signature."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from invarlock.checkpoints.checksums import digests
from invarlock.checkpoints.output_folder import OutputFolder, unwritable_said, write_text
from invarlock.checkpoints.shard_writer import ShardedOutput
from invarlock.checkpoints.storage import storage_of
from invarlock.core.errors import InvarlockError, one_line
from invarlock.core.plain import OWN, plain
from invarlock.core.storage import Storage
from invarlock.pipeline.clock import Clock
from invarlock.reporting.page import render_html
from invarlock.reporting.plots import plot
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import to_json

log = logging.getLogger("invarlock")


def write(
    report: dict[str, Any],
    output: OutputFolder,
    clock: Clock,
    save: Callable[..., None] | None = None,
    *,
    shards: ShardedOutput | None = None,
) -> None:
    """Write the model, if there is one to save, the report, as JSON and as HTML, and the signature.

    All is put to the side and takes its place when it is whole, and what is there by then goes only then.

    :param save: writes an accepted model, or what it lacks yet, to a folder, given that and the report.
    :param shards: the weights, if they are written already.
    :raises UsageError: something could not be written; then everything is as it was.
    :raises InvarlockError: it could not be signed; then the rest is saved.
    """
    with clock.stage("page"):
        plots = _drawn(report)
    with unwritable_said(output.path), output.replaced() as new:
        if save is not None:
            with shards.completed(new / "model") if shards else nullcontext(new / "model") as folder:
                folder.mkdir(exist_ok=True)
                with clock.stage("save"):
                    save(folder, report=report)
                report["storage"]["after"] = plain(_storage_of(folder), OWN)
                with clock.stage("digests"):
                    report["artifacts"] |= digests(folder, "model")
                report["timings"] = clock.timings()
                write_text(folder / "report.json", to_json(report))
        else:
            report["timings"] = clock.timings()
        write_text(new / "report.json", to_json(report))
        if plots is not None:
            _write_page(report, plots, output.path, new)
        unsigned = _sign(output, new)
    if unsigned:
        raise unsigned


def _storage_of(folder: Path) -> Storage | None:
    """Of a saved model, whichever of the formats it is in."""
    return storage_of(next(iter(sorted(folder.glob("*.gguf"))), folder))


def _sign(output: OutputFolder, folder: Path) -> InvarlockError | None:
    try:
        if output.sign:
            output.sign(folder)
    except InvarlockError as error:
        return error
    return None


def _drawn(report: dict[str, Any]) -> list[plot.Plot] | None:
    """The plots of the edit, drawn before the seconds of the stages are written; None if that failed."""
    with _no_run_is_lost():
        return plot.plots_of(SavedReport(report).report)
    return None


def _write_page(report: dict[str, Any], plots: list[plot.Plot], run: Path, folder: Path) -> None:
    with _no_run_is_lost():
        write_text(folder / "report.html", render_html(report, run, plots, files=folder))


@contextmanager
def _no_run_is_lost() -> Iterator[None]:
    """For lack of a page: a failure of the block is a warning."""
    try:
        yield
    except Exception as error:
        log.warning("report.html could not be written: %s; report.json is whole", one_line(error))
        log.debug("report.html", exc_info=True)
