"""The parsers as argparse-manpage wants them: a function ``NAME_parser`` for each page, with built-in commands only.

``tox -e man`` writes the committed pages anew; ``.ci/run`` holds them to be current.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from invarlock.cli.parser import build_parser
from invarlock.config.schema import Key, keys
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager

INCLUDES = Path(__file__).parents[2] / "man" / "include"
"""Sections that are written by hand; a command need not have any."""


def command_names() -> list[str]:
    return list(_commands(_whole_parser()))


def main_parser() -> argparse.ArgumentParser:
    """``invarlock(1)``: the commands have pages of their own, so this one only lists them."""
    parser = _whole_parser()
    parser.epilog = None
    parser.man_short_description = "judge whether an edit broke a model"  # type: ignore[attr-defined]
    _commands(parser).clear()
    return parser


def __getattr__(name: str) -> Callable[[], argparse.ArgumentParser]:
    command = name.removesuffix("_parser")
    if command == name or command not in command_names():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return partial(_command_parser, command)


def _whole_parser() -> argparse.ArgumentParser:
    return build_parser(PluginManager.load(Selection(autoload=False)))


def _command_parser(name: str) -> argparse.ArgumentParser:
    whole = _whole_parser()
    parser = _commands(whole)[name]
    sections = [] if include_of(name) else _sections_of(parser)
    if name == "run":
        sections.append({"heading": "CONFIGURATION", "content": _keys_as_roff()})
    parser._manpage = sections  # type: ignore[attr-defined]
    parser.man_short_description = _summaries(whole)[name]  # type: ignore[attr-defined]
    # The page is found by this name: a space would end the title.
    parser.usage = parser.format_usage().removeprefix("usage: ").strip()
    parser.prog = f"invarlock-{name}"
    # Examples have a section of their own.
    parser.epilog = None
    _drop_what_repeats(parser)
    return parser


def include_of(page: str) -> Path | None:
    """The sections of a command's page that are written by hand, where it has any."""
    path = INCLUDES / f"invarlock-{page}.man"
    return path if path.is_file() else None


def _sections_of(parser: argparse.ArgumentParser) -> list[dict[str, str]]:
    """Sections of a command that has none written by hand: its examples, and where the rest is told."""
    examples = str(parser.epilog).removeprefix("examples:\n")
    sections = {"EXAMPLES": f".nf\n{_escaped(examples)}\n.fi", "FILES": "None."}
    see = "See\n.BR invarlock (1)."
    return [
        {"heading": heading, "content": sections.get(heading, see)}
        for heading in ("EXAMPLES", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO")
    ]


def _drop_what_repeats(parser: argparse.ArgumentParser) -> None:
    """Leave out commands below that take the same options as the command itself."""
    if not any(isinstance(action, argparse._SubParsersAction) for action in parser._actions):
        return
    below = _commands(parser)
    for name, command in list(below.items()):
        command.epilog = None
        if command._option_string_actions.keys() <= parser._option_string_actions.keys():
            del below[name]


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
