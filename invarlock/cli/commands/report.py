"""``invarlock report``: show a report again, in another form, or several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
from invarlock.cli.options import path_argument
from invarlock.core.errors import ExitCode, UsageError, one_line
from invarlock.reporting.formats import FORMATS, TERMINAL, ReportFormat

if TYPE_CHECKING:
    from invarlock.reporting.reading import SavedReport

DESCRIPTION = """\
Shows the report of a run: on the terminal, as a page, or for a continuous-integration system. Several runs are put side
by side, and the best accepted one is marked. The exit status tells nothing of the verdict."""

EPILOG = """\
examples:
  invarlock report runs/int8
  invarlock report runs/int8 -o report.html
  invarlock report runs/int8 --format junit -o junit.xml
  invarlock report runs/int8 runs/int4 runs/int3"""


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report", help="show the report of a run, or several side by side", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument(
        "reports", type=path_argument, nargs="+", metavar="RUN", help="a run's folder, or its report.json"
    )
    parser.add_argument(
        "--format",
        choices=[each.name for each in FORMATS],
        help="default: what the name of the output file ends in says, else terminal",
    )
    parser.add_argument(
        "-o", "--output", type=path_argument, metavar="FILE", help="write to a file instead of standard output"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Only here: start-up has use for neither templates nor rich.
    from invarlock.reporting.reading import SavedReport

    runs = [SavedReport.read(Path(path)) for path in args.reports]
    chosen = _chosen(args.format, args.output)
    try:
        _show(runs, chosen, args.output)
    except (RecursionError, ValueError, OverflowError) as error:
        # A report can be any file: nested without end, or with figures that no plot holds.
        raise UsageError(f"{args.reports[0]}: cannot be shown as {chosen.name}: {one_line(error)}") from error
    return ExitCode.ACCEPTED


def _chosen(name: str | None, output: str | None) -> ReportFormat:
    """:raises UsageError: neither an option nor the file's name says which."""
    if name:
        return next(each for each in FORMATS if each.name == name)
    if output is None:
        return TERMINAL
    suffix = Path(output).suffix.lower()
    for each in FORMATS:
        if each.suffix == suffix:
            return each
    known = ", ".join(each.suffix for each in FORMATS)
    raise UsageError(f"-o {output}: {suffix or 'no suffix'} says no format; add --format, or use {known}")


def _show(runs: Sequence[SavedReport], chosen: ReportFormat, output: str | None) -> None:
    if output:
        _write(Path(output), chosen.render(runs))
    elif chosen is TERMINAL:
        # Here, for the console that knows the terminal's width and colours.
        from rich.console import Console

        from invarlock.reporting.terminal import print_to

        print_to(Console(soft_wrap=True), runs)
    else:
        sys.stdout.write(chosen.render(runs))


def _write(path: Path, text: str) -> None:
    from invarlock.checkpoints.output_folder import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"-o {path}: cannot be written: {one_line(error)}") from error
