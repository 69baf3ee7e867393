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

if TYPE_CHECKING:
    from invarlock.reporting.reading import Run

FORMATS = ("terminal", "markdown", "html", "junit", "sarif", "json")
SUFFIXES = {".txt": "terminal", ".md": "markdown", ".html": "html", ".xml": "junit", ".sarif": "sarif", ".json": "json"}

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
        "--format", choices=FORMATS, help="default: what the name of the output file ends in says, else terminal"
    )
    parser.add_argument(
        "-o", "--output", type=path_argument, metavar="FILE", help="write to a file instead of standard output"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Only here: start-up has use for neither templates nor rich.
    from invarlock.reporting.reading import Run

    runs = [Run.read(Path(path)) for path in args.reports]
    format_ = args.format or _format_of(args.output)
    try:
        _show(runs, format_, args.output)
    except (RecursionError, ValueError, OverflowError) as error:
        # A report can be any file: nested without end, or with figures that no plot holds.
        raise UsageError(f"{args.reports[0]}: cannot be shown as {format_}: {one_line(error)}") from error
    return ExitCode.ACCEPTED


def _format_of(output: str | None) -> str:
    """:raises UsageError: the file's name does not say."""
    if output is None:
        return "terminal"
    suffix = Path(output).suffix.lower()
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UsageError(f"-o {output}: {suffix or 'no suffix'} says no format; add --format, or use {known}")
    return SUFFIXES[suffix]


def _show(runs: Sequence[Run], format_: str, output: str | None) -> None:
    from invarlock.reporting.rendering import render

    if output:
        _write(Path(output), render(runs, format_))
    elif format_ == "terminal":
        # Here, for the console that knows the terminal's width and colours.
        from rich.console import Console

        from invarlock.reporting.rendering import print_to

        print_to(Console(soft_wrap=True), runs)
    else:
        sys.stdout.write(render(runs, format_))


def _write(path: Path, text: str) -> None:
    from invarlock.checkpoints.output_folder import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"-o {path}: cannot be written: {one_line(error)}") from error
