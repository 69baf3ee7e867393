"""The entry point: reads ``-p`` first, builds the parser, runs a command, turns errors into exit codes."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence

from invarlock.cli import signals
from invarlock.cli.parser import build_parser, read_plugin_options
from invarlock.core.errors import ExitCode, InvarlockError, one_line
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and prints at most one line for an error."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    tracing = os.environ.get("INVARLOCK_DEBUG_TRACE") == "1"
    _log_to_stderr(logging.DEBUG if tracing else logging.WARNING)
    try:
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
    except BrokenPipeError:
        # The reader of a pipe is gone; what was left to say has no listener.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.ACCEPTED
    except Exception:
        traceback.print_exc()
        _say("this is a bug in invarlock, or in a plugin named above")
        return ExitCode.FAILED


def _run(arguments: list[str]) -> int:
    """Parse and dispatch.

    The ``-p`` options are read before anything is imported, so that a broken plugin can always be turned off.
    """
    autoload = os.environ.get("INVARLOCK_DISABLE_PLUGIN_AUTOLOAD") != "1"
    selection = Selection.of(read_plugin_options(arguments), autoload=autoload)
    plugins = PluginManager.load(selection)
    parser = build_parser(plugins)
    args = parser.parse_args(arguments)
    if not hasattr(args, "run"):
        parser.print_help()
        return ExitCode.USAGE
    args.manager, args.selection = plugins, selection
    code: int = args.run(args)
    return code


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
