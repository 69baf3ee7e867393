"""Every command has help with examples, and the examples run as they are printed."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import JUDGED, lay_out, perform

from invarlock.cli.parser import build_parser
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from parsers(below)


HELP = {
    parser.prog: parser.format_help() for parser in parsers(build_parser(PluginManager.load(Selection(autoload=False))))
}


def examples(text: str) -> list[str]:
    """The lines below ``examples:``, to the next empty one."""
    found = re.search(r"^examples:\n((?:  .+\n?)+)", text, re.MULTILINE)
    return [line.strip() for line in found[1].splitlines()] if found else []


@pytest.mark.parametrize("command", HELP)
def test_a_command_has_examples_that_run(command: str, invarlock, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    lines = examples(HELP[command])
    assert lines, f"{command} --help has no examples"
    for line in lines:
        assert line.split("invarlock")[0] == "" and line.startswith(command), line
        lay_out(line)
        done = perform(line, invarlock)
        assert done.code in JUDGED, f"{line}: {done.err}"
        assert done.out or any(Path(word).is_file() for word in shlex.split(line)), line
