"""The parsers as argparse-manpage wants them: a function a page, with built-in commands only.

``tox -e man`` writes the committed pages anew; ``.ci/run`` holds them to be current.
"""

from __future__ import annotations

import argparse

from invarlock.cli.parser import build_parser
from invarlock.config.schema import Key, keys
from invarlock.plugins.catalog import Catalog
from invarlock.plugins.manager import PluginManager


def main_parser() -> argparse.ArgumentParser:
    """``invarlock(1)``: the commands have pages of their own, so this one only lists them."""
    parser = _whole_parser()
    parser.epilog = None
    parser.man_short_description = "judge whether an edit broke a model"  # type: ignore[attr-defined]
    _commands(parser).clear()
    return parser


def run_parser() -> argparse.ArgumentParser:
    """``invarlock-run(1)``, with every configuration key in a section of its own."""
    parser = _command_parser("run")
    parser._manpage = [{"heading": "CONFIGURATION", "content": _keys_as_roff()}]  # type: ignore[attr-defined]
    return parser


def compare_parser() -> argparse.ArgumentParser:
    """``invarlock-compare(1)``."""
    return _command_parser("compare")


def report_parser() -> argparse.ArgumentParser:
    """``invarlock-report(1)``."""
    return _command_parser("report")


def verify_parser() -> argparse.ArgumentParser:
    """``invarlock-verify(1)``."""
    return _command_parser("verify")


def doctor_parser() -> argparse.ArgumentParser:
    """``invarlock-doctor(1)``."""
    return _command_parser("doctor")


def plugins_parser() -> argparse.ArgumentParser:
    """``invarlock-plugins(1)``: the categories take the options of the command, so that only ``new`` has its own."""
    parser = _command_parser("plugins")
    commands = _commands(parser)
    new = commands["new"]
    new.epilog = None
    commands.clear()
    commands["new"] = new
    return parser


def config_parser() -> argparse.ArgumentParser:
    """``invarlock-config(1)``."""
    return _command_parser("config")


def completion_parser() -> argparse.ArgumentParser:
    """``invarlock-completion(1)``."""
    return _command_parser("completion")


def _whole_parser() -> argparse.ArgumentParser:
    return build_parser(PluginManager(Catalog()))


def _command_parser(name: str) -> argparse.ArgumentParser:
    whole = _whole_parser()
    parser = _commands(whole)[name]
    parser.man_short_description = _summaries(whole)[name]  # type: ignore[attr-defined]
    # The page is found by this name: a space would end the title.
    parser.usage = parser.format_usage().removeprefix("usage: ").strip()
    parser.prog = f"invarlock-{name}"
    # Examples stand in the include file, in a section of their own.
    parser.epilog = None
    return parser


def _subparsers(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    commands: dict[str, argparse.ArgumentParser] = _subparsers(parser).choices
    return commands


def _summaries(parser: argparse.ArgumentParser) -> dict[str, str]:
    return {action.dest: action.help or "" for action in _subparsers(parser)._choices_actions}


def _keys_as_roff() -> str:
    intro = "A YAML file of nested mappings; with \\fB\\-\\-set\\fR the keys are dotted. Only model.id is required."
    return "\n".join([intro, *(_key_as_roff(key) for key in keys())])


def _key_as_roff(key: Key) -> str:
    path, kind, default, sentence = map(_escaped, (key.path, key.type, key.default, key.sentence))
    return f".TP\n\\fB{path}\\fR ({kind}; default {default})\n{sentence}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("-", "\\-")
