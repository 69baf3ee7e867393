"""Command lines in processes of their own, forked from one that has imported torch already: a test starts many."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import contextlib, json, os, sys, tempfile
from invarlock.cli.main import console, main

# All that a run imports.
with contextlib.redirect_stdout(sys.stderr):
    assert main(sys.argv[1:]) == 0
for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(os.waitstatus_to_exitcode(status) if pid else "", flush=True)
    elif child := os.fork():
        print(child, flush=True)
    else:
        os.chdir(order["cwd"])
        os.environ.update(order["env"])
        tempfile.tempdir = None
        for number, name in enumerate(("/dev/null", *order["files"])):
            os.dup2(os.open(name, os.O_RDWR), number)
        sys.stdin = open(os.devnull)
        exec(order["program"])
        sys.argv[1:] = order["arguments"]
        console()
"""
FULL = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({bytes}, {bytes}))
"""
"""Program of a process that can write no file larger than so many bytes, as on a full disk."""
NO_READER = """
read, write = os.pipe()
os.close(read)
os.dup2(write, 1)
"""
"""Program of a process whose standard output is a pipe that nobody reads any more."""
CONSENTING = """
read, write = os.pipe()
os.write(write, b"y\\n" * 99)
os.dup2(read, 0)
sys.stdin = open(0)
"""
"""Program of a process whose standard input says yes to every question, as that of ``yes |`` does."""
WARMING = ["run", "--demo", "-q", "--set", "output.save_model=true", "--set", "dataset.final_n=2"]


@dataclass
class Forked:
    """A process of the command line."""

    server: Forking
    pid: int
    files: tuple[Path, Path]
    code: int | None = None

    def wait(self, timeout: float = 120) -> int:
        """The exit status; minus the signal's number if one killed it."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, f"it did not end: {self.said()}"
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def poll(self) -> int | None:
        if self.code is None and (answer := self.server.ask(poll=self.pid)):
            self.code = int(answer)
        return self.code

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        if self.poll() is None:
            self.send(signal.SIGKILL)
            self.wait()

    def said(self) -> tuple[str, str]:
        """Its standard output and standard error so far."""
        out, err = (path.read_text() for path in self.files)
        return out, err


@dataclass
class Forking:
    """The server that forks them."""

    process: subprocess.Popen[str]
    folder: Path
    count: int = 0

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[Forking]:
        with subprocess.Popen(
            [sys.executable, "-c", SERVER, *WARMING, "--out", str(folder / "out")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            yield cls(process, folder)

    def start(self, *arguments: object, program: str = "", **variables: str) -> Forked:
        """Start the command line here.

        :param program: runs before it, in the same process.
        :param variables: of its environment, besides those of this process.
        """
        self.count += 1
        files = (self.folder / f"{self.count}.out", self.folder / f"{self.count}.err")
        for file in files:
            file.touch()
        words = [str(argument) for argument in arguments]
        pid = self.ask(
            arguments=words, program=program, cwd=str(Path.cwd()), env=os.environ | variables, files=[*map(str, files)]
        )
        return Forked(self, int(pid), files)

    def ask(self, **order: Any) -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()
