"""``invarlock completion``: a script that makes a shell complete commands and options."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from invarlock import hookimpl
from invarlock.core.errors import ExitCode, UsageError

DESCRIPTION = """\
Prints a script that makes a shell complete commands, options and files. The script is static: pressing TAB starts no
Python. Print it anew after an upgrade, or when a plugin has added a command."""

EPILOG = """\
examples:
  invarlock completion bash > ~/.local/share/bash-completion/completions/invarlock
  invarlock completion zsh > ~/.zfunc/_invarlock
  invarlock completion fish > ~/.config/fish/completions/invarlock.fish

In zsh the folder has to be in fpath before compinit: fpath+=~/.zfunc in .zshrc."""

SHELLS = ("bash", "zsh", "fish")


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "completion", help="print a completion script for a shell", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("shell", choices=SHELLS, help="the shell that shall complete")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Only here: an extra, and what it imports is of no use to other commands.
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise UsageError("completion needs shtab: pip install 'invarlock[completion]'") from error
    for action in _actions(args.root):
        if action.metavar in ("DIR", "RUN"):
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in ("CONFIG", "FILE", "FILE.jsonl"):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(args.root, args.shell))
    return ExitCode.ACCEPTED


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of a parser and of all below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
