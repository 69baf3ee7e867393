"""Completion in real shells, on a terminal: keys go in, and what the shell made of them comes out."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

# `invarlock` is a function that prints its words, so that the completed line can be read off when Enter runs it.
SHELLS = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "invarlock() { echo \"<$*>\"; }; source ./script; echo rea''dy\n"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "invarlock() { print -r -- \"<$*>\"; }; mkdir -p f; cp script f/_invarlock; fpath=($PWD/f $fpath); "
        "autoload -Uz compinit; compinit -u -d dump; echo rea''dy\n",
    ),
    "fish": (["fish", "--no-config", "-i"], "function invarlock; echo \"<$argv>\"; end; source ./script; echo rea''dy\n"),
}  # fmt: skip


class Terminal:
    """An interactive shell on a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.screen = ""
        self._master, slave = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "HOME": str(Path.cwd())}
        # fish does not start on a terminal that is not its controlling one.
        self._shell = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)

    def type(self, keys: str, *, until: str) -> None:
        """Send keys, then read until some text is on the screen."""
        os.write(self._master, keys.encode())
        end = time.monotonic() + 20
        while until not in self.screen:
            ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{until!r} never came; the screen shows {self.screen!r}"
            self.screen += os.read(self._master, 4096).decode(errors="replace")

    def close(self) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._master)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ("invarlock comple\tz\t\n", "<completion zsh>"),
        ("invarlock run --stre\t--conf\tco\t\n", "<run --stream --config config.yaml>"),
        ("invarlock plugins guards --onl\tmiss\t\n", "<plugins guards --only missing>"),
    ],
    ids=["commands", "options and files", "choices"],
)
@pytest.mark.parametrize("shell", SHELLS)
def test_tab_completes(invarlock, shell: str, keys: str, line: str) -> None:
    for program in (shell, "setsid"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    Path("script").write_text(invarlock("completion", shell).out)
    Path("config.yaml").touch()
    command, setup = SHELLS[shell]
    terminal = Terminal(command)
    try:
        terminal.type(setup, until="ready")
        terminal.type(keys, until=line)
    finally:
        terminal.close()


def test_commands_of_plugins_are_completed_too(invarlock, module) -> None:
    module(
        "greeter",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_add_commands(subparsers):\n"
        "    subparsers.add_parser('greet', help='say hello')\n",
    )
    assert "greet" not in invarlock("completion", "bash").out
    assert "greet" in invarlock("-p", "greeter", "completion", "bash").out


def test_without_the_library_what_to_install_is_said(invarlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    done = invarlock("completion", "bash")
    assert done.code == 2
    assert "pip install 'invarlock[completion]'" in done.err
