"""``invarlock report``: show a report again, in another form, or several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
from invarlock.cli.options import path_argument
from invarlock.core.errors import ExitCode, PluginError, UsageError, one_line, unknown
from invarlock.reporting.formats import FORMATS, TERMINAL, ReportFormat

if TYPE_CHECKING:
    from invarlock.plugins.manager import PluginManager
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
        metavar="FORMAT",
        help=f"{', '.join(each.name for each in FORMATS)}, or a plugin's; by default as the output file is named, "
        "else terminal",
    )
    parser.add_argument(
        "-o", "--output", type=path_argument, metavar="FILE", help="write to a file instead of standard output"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Only here: start-up has use for neither templates nor rich.
    from invarlock.reporting.reading import SavedReport

    beside = Path(args.output).absolute().parent if args.output else None
    runs = [SavedReport.read(Path(path), beside) for path in args.reports]
    chosen = _chosen(args.manager, args.format, args.output)
    try:
        _show(runs, chosen, args.output)
    except (RecursionError, ValueError, OverflowError) as error:
        # A report can be any file: nested without end, or with figures that no plot holds.
        raise UsageError(f"{args.reports[0]}: cannot be shown as {chosen.name}: {one_line(error)}") from error
    return ExitCode.ACCEPTED


def _chosen(manager: PluginManager, name: str | None, output: str | None) -> ReportFormat:
    """:raises UsageError: neither an option nor the file's name says which."""
    if name:
        if found := next((each for each in _formats(manager) if each.name == name), None):
            return found
        known = [each.name for each in _formats(manager)]
        raise UsageError(f"--format: {unknown('format', name, known)}")
    if output is None:
        return TERMINAL
    suffix = Path(output).suffix.lower()
    if found := next((each for each in _formats(manager) if each.suffix == suffix), None):
        return found
    suffixes = ", ".join(each.suffix for each in _formats(manager))
    raise UsageError(f"-o {output}: {suffix or 'no suffix'} says no format; add --format, or use {suffixes}")


def _formats(manager: PluginManager) -> Iterator[ReportFormat]:
    """The built-in formats, then those of plugins, which are asked for nothing that is built in."""
    yield from FORMATS
    yield from (found.value for found in manager.report_formats().values() if found.value not in FORMATS)


def _show(runs: Sequence[SavedReport], chosen: ReportFormat, output: str | None) -> None:
    if output:
        _write(Path(output), _rendered(chosen, runs))
    elif chosen is TERMINAL:
        # Here, for the console that knows the terminal's width and colours.
        from rich.console import Console

        from invarlock.reporting.terminal import print_to

        print_to(Console(soft_wrap=True), runs)
    else:
        sys.stdout.write(_rendered(chosen, runs))


def _rendered(chosen: ReportFormat, runs: Sequence[SavedReport]) -> str:
    text = chosen.render(runs)
    if not isinstance(text, str):
        raise PluginError(f"report format {chosen.name}: render returned {type(text).__name__}, not a text")
    return text


def _write(path: Path, text: str) -> None:
    from invarlock.checkpoints.output_folder import write_text

    try:
        write_text(path, text)
    except OSError as error:
        raise UsageError(f"-o {path}: cannot be written: {one_line(error)}") from error
