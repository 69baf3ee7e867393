"""The parser of ``invarlock``, and what its commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from invarlock import __version__
from invarlock.core.errors import UsageError, nearest
from invarlock.plugins.manager import PluginManager

DESCRIPTION = """\
Did this edit break the model, and may it ship? Loads a model, measures it, quantizes it by round-to-nearest, lets
guards look at it before and after, and keeps the edit, rolls it back or aborts."""

EPILOG = """\
examples:
  invarlock run --demo
  invarlock run -c config.yaml --strict
  invarlock compare --baseline original --subject quantized
  invarlock plugins

exit status:
  0    accepted (with --strict: without a warning)
  1    rejected or inconclusive (with --strict: also a warning)
  2    wrong usage, configuration or input; nothing was run
  3    a plugin or invarlock itself failed
  129  the terminal is gone (SIGHUP)
  130  interrupted (Ctrl-C)
  143  told to end (SIGTERM)"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, with the nearest known option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(parsed, "parser", self)
            known = [option for action in command._actions for option in action.option_strings]
            command.error(f"unknown argument {unknown[0]}{nearest(unknown[0], known)}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message} (see {self.prog} --help)")


class CommandParser(Parser):
    """The parser of one command: every command takes ``-p``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_plugin_option(self)
        self.set_defaults(parser=self)

    def format_help(self) -> str:
        # An epilog can be a function, called when somebody reads it.
        if callable(self.epilog):
            self.epilog = self.epilog()
        return super().format_help()


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p", dest="plugins", action="append", metavar="MODULE", default=argparse.SUPPRESS,
        help="load a plugin: a module, or the name of an installed plugin; no:NAME blocks the plugin NAME",
    )  # fmt: skip


def read_plugin_options(arguments: Sequence[str]) -> list[str]:
    """The values of ``-p``, wherever they stand, before there is a parser for the rest."""
    parser = Parser(prog="invarlock", add_help=False)
    add_plugin_option(parser)
    early, _ = parser.parse_known_args([word for word in arguments if word != "--"])
    return getattr(early, "plugins", [])


def build_parser(manager: PluginManager) -> argparse.ArgumentParser:
    """The parser with the commands that plugins add, the built-in ones first."""
    parser = Parser(prog="invarlock", description=DESCRIPTION, epilog=EPILOG)
    parser.set_defaults(root=parser)
    add_plugin_option(parser)
    parser.add_argument("--version", action="version", version=f"invarlock {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=CommandParser)
    manager.add_commands(subparsers)
    return parser
