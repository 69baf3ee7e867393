"""An isolated command line with local plugins, in the manner of pytest's ``pytester``."""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

TERMINAL = {"COLUMNS": "100", "NO_COLOR": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str
    report: dict[str, Any] | None = None
    """Content of the ``report.json`` that the command wrote below the working folder, if it did."""


@dataclass(frozen=True)
class Invarlocker:
    """The command line, its working folder, and the folder that plugins are installed to."""

    path: Path
    site: Path

    @classmethod
    @contextmanager
    def isolated(cls, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Invarlocker]:
        """Work in ``path``, with a pinned terminal, no network and no ``INVARLOCK_`` settings.

        Modules that were imported from there meanwhile are forgotten afterwards.
        """
        site = path / "site"
        monkeypatch.chdir(path)
        for name in [name for name in os.environ if name.startswith("INVARLOCK_")]:
            monkeypatch.delenv(name)
        for name, value in (TERMINAL | OFFLINE).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "path", [str(site), *sys.path])
        before = set(sys.modules)
        yield cls(path, site)
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(path)):
                del sys.modules[name]

    # -- plugins -------------------------------------------------------------------------------------------------------

    def module(self, name: str, source: str) -> Path:
        """Write a module into the working folder, to be named with ``-p``."""
        path = self.path / f"{name}.py"
        path.write_text(source)
        importlib.invalidate_caches()
        return path

    def install(self, distribution: str, entry_points: str = "", version: str = "1.0", **modules: str) -> Path:
        """Lay modules and a distribution's entry points on the path, as an installer would.

        :param entry_points: what ``entry_points.txt`` holds, for example ``[invarlock.guards]\\nname = module:Class``.
        :param modules: source by name.
        :returns: the folder that they are in.
        """
        info = self.site / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        for name, source in modules.items():
            (self.site / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return self.site

    # -- commands ------------------------------------------------------------------------------------------------------

    def run(self, *arguments: object) -> Done:
        """Run ``invarlock`` with these arguments, in this process."""
        from invarlock.cli.main import main

        before, out, err = self._reports(), io.StringIO(), io.StringIO()
        with _process_kept(), redirect_stdout(out), redirect_stderr(err):
            try:
                code = int(main([str(argument) for argument in arguments]))
            except SystemExit as stopped:  # argparse, after --help and --version
                code = int(stopped.code or 0)
        return Done(code, out.getvalue(), err.getvalue(), self._written_since(before))

    def run_subprocess(self, *arguments: object, timeout: float = 300) -> Done:
        """Run ``invarlock`` with these arguments, in a process of its own."""
        before = self._reports()
        path = os.pathsep.join(filter(None, [str(self.site), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            [sys.executable, "-m", "invarlock", *map(str, arguments)],
            cwd=self.path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        return Done(done.returncode, done.stdout, done.stderr, self._written_since(before))

    def _reports(self) -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in self.path.rglob("report.json")}

    def _written_since(self, before: dict[Path, int]) -> dict[str, Any] | None:
        written = [path for path, time in self._reports().items() if before.get(path) != time]
        # A saved model has a copy beside its weights, further down.
        report = min(written, key=lambda path: len(path.parts), default=None)
        return None if report is None else dict(json.loads(report.read_text()))


@contextmanager
def _process_kept() -> Iterator[None]:
    """The command line sets up the logger ``invarlock`` and libraries' settings for itself; put them back."""
    logger, environment = logging.getLogger("invarlock"), dict(os.environ)
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
        os.environ.clear()
        os.environ.update(environment)
