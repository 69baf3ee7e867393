"""The entry point: reads ``-p`` first, builds the parser, runs a command, turns errors into exit codes."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from invarlock.cli import leaving, signals, streams
from invarlock.cli.parser import build_parser, read_plugin_options
from invarlock.core.errors import ExitCode, InvarlockError, PluginError, UsageError, contained, one_line
from invarlock.core.invocation import Invocation
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager

NEW_OBJECTS = 200_000
"""After which Python looks for cycles, in place of some hundreds: while torch and transformers are imported nothing
becomes garbage, and to look took 0.8 of 4.3 s."""
ON, OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def console() -> NoReturn:
    """End this process with what ``main`` returns, whatever plugins have left running and whoever reads the output."""
    started = time.time()
    gc.set_threshold(NEW_OBJECTS)
    streams.take(aside="--json" in sys.argv)
    try:
        code = main()
    except SystemExit as stopped:  # argparse, after --help and --version
        code = int(stopped.code or 0)
    except BaseException:
        # Python's own status would be 1, which is a verdict's.
        code = ExitCode.FAILED
        traceback.print_exc()
    leaving.leave(code, started)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints at most one line for an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    tracing = False
    _log_to_stderr(logging.WARNING)
    try:
        if tracing := _is_on("INVARLOCK_DEBUG_TRACE"):
            _log_to_stderr(logging.DEBUG)
        with signals.taken():
            return _run(arguments)
    except InvarlockError as error:
        if tracing:
            traceback.print_exc()
        _say(one_line(error))
        return error.exit_code
    except KeyboardInterrupt as interrupt:
        _say(signals.told(interrupt))
        return signals.status(interrupt)
    except Exception:
        traceback.print_exc()
        _say("this is a bug in invarlock, or in a plugin named above")
        return ExitCode.FAILED


def _run(arguments: list[str]) -> int:
    invocation = Invocation.of(arguments)
    # Values of -p are read before anything is imported, so that a broken plugin can always be turned off.
    autoload = not _is_on("INVARLOCK_DISABLE_PLUGIN_AUTOLOAD")
    selection = Selection.of(read_plugin_options(arguments), autoload=autoload)
    with streams.aside():
        plugins = PluginManager.load(selection)
    parser = build_parser(plugins)
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return ExitCode.USAGE
    args.manager, args.selection, args.invocation = plugins, selection, invocation
    with contained():
        code = args.run(args)
    if not isinstance(code, int):
        raise PluginError(f"the command returned {type(code).__name__}, not an exit code")
    if code == ExitCode.ACCEPTED and not getattr(args, "judges", False):
        streams.require_written()
    return code


def _is_on(variable: str) -> bool:
    """:raises UsageError: an environment variable says neither yes nor no."""
    value = os.environ.get(variable, "")
    if value.lower() not in (*ON, *OFF):
        raise UsageError(f"{variable}={value}: is neither one of {', '.join(ON)} nor of {', '.join(OFF[1:])}")
    return value.lower() in ON


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter())
    logger = logging.getLogger("invarlock")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"invarlock: {record.levelname.lower()}: {record.getMessage()}"


def _say(line: str) -> None:
    print(f"invarlock: error: {line}", file=sys.stderr)
