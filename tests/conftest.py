"""What the tests share: a command line in this process, plugins laid on the path, and the demo model."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

# Before transformers is imported, as the command line does it: a test must not wait for a network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

from invarlock.cli.commands.run import demo_folder
from invarlock.cli.main import main

DEMO = demo_folder()


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A working folder of its own, a pinned terminal, and no settings of the person who runs the tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.delenv("INVARLOCK_DEBUG_TRACE", raising=False)
    monkeypatch.delenv("INVARLOCK_DISABLE_PLUGIN_AUTOLOAD", raising=False)


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


@pytest.fixture
def invarlock(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Call the command line as ``main`` in this process."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        try:
            code = int(main([str(argument) for argument in arguments]))
        except SystemExit as stopped:  # argparse, after --help and --version
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return call


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Lay modules and a distribution's entry points on the path, as an installer would; gone after the test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)

    def lay(distribution: str, entry_points: str = "", version: str = "1.0", **modules: str) -> Path:
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(entry_points)
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        return folder

    yield lay
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(folder) in str(sys.modules[name].__file__):
            del sys.modules[name]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Write a module into the working folder, to be named with ``-p``; forgotten after the test."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    written: list[str] = []

    def write(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., Path]:
    """Write a run of the demo model; keyword arguments replace whole sections."""

    def write(**sections: Any) -> Path:
        values = {
            "model": {"id": str(DEMO / "checkpoint"), "adapter": "hf_causal", "device": "cpu", "dtype": "float32"},
            "dataset": {"provider": "demo", "seq_len": 64, "preview_n": 2, "final_n": 6},
            "edit": {"plan": {"bitwidth": 8, "scope": "all"}},
            "guards": {"order": ["invariants"]},
        } | sections
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def demo() -> Any:
    """The demo model, float32; to be copied before it is changed."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32").eval()


@pytest.fixture(scope="session")
def text() -> list[Any]:
    """Two batches of real text for the demo model."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    lines = (DEMO / "text.jsonl").read_text().splitlines()[:30]
    ids = tokenizer(" ".join(json.loads(line)["text"] for line in lines), verbose=False)["input_ids"]
    return list(torch.tensor(ids[: 4 * 128]).view(2, 2, 128))


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())
