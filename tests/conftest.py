"""What the tests share: short names for the isolated command line, a configuration, and the demo model."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from forked import Forking

# Before transformers is imported, as the command line does it: a test must not wait for a network.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Before torch is imported: as many tests run at once as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from invarlock.cli.commands.run import demo_folder
from invarlock.testing import Done, Invarlocker

# What a shell starts in the background ignores Ctrl-C, and so would all that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

DEMO = demo_folder()
LONGEST = ("test_ranks", "test_streaming", "test_misbehaviour", "test_scaffold", "test_fused")
"""Files that take longest: begun last, one of them would keep a single core busy while the others wait."""
DRAWING = ("test_browser", "test_endings", "test_evidence", "test_output", "test_reports", "test_run", "test_streaming")
"""Tests of pages, and of what drawing them leaves."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def slow(*cases: object) -> list[Any]:
    """Cases that the suite leaves to ``tox -e slow``; a tuple holds several arguments."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow) for case in cases]


@pytest.fixture(autouse=True)
def _isolated(invarlocker: Invarlocker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a working folder of its own, and neither settings nor plugins of the person who runs it."""
    installed = metadata.entry_points

    def ours(**parameters: Any) -> Any:
        found = installed(**parameters)
        # Without a group Python 3.11 gives a dict of all groups, which other libraries ask for.
        return metadata.EntryPoints(entry for entry in found if _is_ours(entry, invarlocker)) if parameters else found

    monkeypatch.setattr(metadata, "entry_points", ours)


@pytest.fixture(autouse=True)
def _undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have no plots but where pages are the matter: drawing takes a quarter of a short run."""
    if request.module.__name__ not in DRAWING:
        monkeypatch.setattr("invarlock.reporting.plots.drawing.drawn", lambda *figures, **options: "")


@pytest.fixture(autouse=True)
def _silent(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of progress in stderr on a machine so busy that a short run takes long."""
    if request.module.__name__ != "test_progress":
        monkeypatch.setattr("invarlock.cli.progress.SILENT_SECONDS", 1e6)


def _is_ours(entry: metadata.EntryPoint, invarlocker: Invarlocker) -> bool:
    return entry.dist.name == "invarlock" or Path(str(entry.dist.locate_file(""))).is_relative_to(invarlocker.path)


@pytest.fixture
def invarlock(invarlocker: Invarlocker) -> Callable[..., Done]:
    """Call the command line in this process."""
    return invarlocker.run


@pytest.fixture
def site(invarlocker: Invarlocker) -> Callable[..., Path]:
    """Lay modules and a distribution's entry points on the path."""
    return invarlocker.install


@pytest.fixture
def module(invarlocker: Invarlocker) -> Callable[[str, str], Path]:
    """Write a module into the working folder, to be named with ``-p``."""
    return invarlocker.module


@pytest.fixture(autouse=True)
def log_reaches_pytest() -> None:
    """A command line that a fixture called in this process keeps the log to itself."""
    logging.getLogger("invarlock").propagate = True


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """Starts processes of the command line, torch imported already."""
    with Forking.started(tmp_path_factory.mktemp("forked")) as server:
        yield server


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


def texts_of(dataset: Any) -> Any:
    """Documents of a dataset as a run gets them; None where the model writes its own."""
    from invarlock.plugins.catalog import Selection
    from invarlock.plugins.manager import PluginManager

    if dataset.provider == "generated":
        return None
    return PluginManager.load(Selection(autoload=False)).documents(dataset)


def read_report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())
