"""Whatever can last tells how far it is."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DEMO, read_report

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.cli.progress import display
from invarlock.config.loading import load
from invarlock.core import progress
from invarlock.pipeline import run, run_streamed
from invarlock.pipeline.clock import Clock
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager

# Of compressed-tensors, on import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("pipeline", [run, run_streamed])
def test_every_stage_is_told_to_its_end(config, pipeline, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.001)
    told: dict[str, list[tuple[int, int]]] = defaultdict(list)
    guards = {"order": ["invariants", "spectral", "reconstruction"]}
    path = config(guards=guards, output={"save_model": True, "format": "dequantized"})
    pipeline(
        load(str(path), [], {}),
        PluginManager.load(Selection()),
        output=OutputFolder(Path("out")),
        on_progress=lambda stage, done, total: told[stage].append((done, total)),
    )
    expected = {"baseline pass", "edited pass", "quantize", "digests", *guards["order"]}
    if pipeline is run:
        expected |= {"snapshot", "fingerprint", "save"}
    assert told.keys() >= expected
    for stage in expected - {"save"}:
        assert told[stage][-1][0] == told[stage][-1][1] > 0, stage
    weights = (DEMO / "checkpoint" / "model.safetensors").stat().st_size
    assert told["digests"][-1][1] > weights
    if pipeline is run:
        assert told["save"][-1][0] <= told["save"][-1][1]
        # In float32, which is twice as wide as what is stored.
        assert told["snapshot"][-1][1] == pytest.approx(2 * weights, rel=0.01)


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
def test_text_that_a_model_writes_is_counted_in_tokens(architecture) -> None:
    from invarlock.datasets.generated import write_text
    from invarlock.datasets.layout import WindowLayout
    from invarlock.testing import tiny_model

    model = tiny_model(architecture)
    layout = WindowLayout.of(model, None, task="causal", length=16)
    if architecture != "llama":
        layout = replace(layout, **({"mask": 3} if architecture == "bert" else {"start": 0}))
    told: list[tuple[int, int]] = []
    with progress.showing(lambda done, total: told.append((done, total))):
        written = write_text(model, layout, 3, seed=0)
    assert 0 < told[-1][0] <= told[-1][1] == written.numel()
    assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_a_folder_that_a_library_writes_to_is_watched(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.01)
    told: list[tuple[int, int]] = []
    with progress.showing(lambda done, total: told.append((done, total))), progress.watched(tmp_path, 100):
        (tmp_path / "below").mkdir()
        (tmp_path / "below" / "weights").write_bytes(b"0" * 60)
        until = time.monotonic() + 10
        while (60, 100) not in told and time.monotonic() < until:
            time.sleep(0.01)
    assert told[-1] == (60, 100)


def test_a_terminal_is_shown_bars_also_of_loading() -> None:
    master, slave = pty.openpty()
    arguments = [
        sys.executable,
        "-m",
        "invarlock",
        "run",
        "--demo",
        "--out",
        "out",
        "--set",
        "guards.order=[hello_guard]",
        "--set",
        "dataset.final_n=auto",
    ]
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=slave, env=os.environ | {"TERM": "xterm"}
    ) as process:
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 4096)
            except OSError:
                break
    os.close(master)
    assert process.returncode == 0, shown
    for stage in (b"load", b"fingerprint", b"baseline pass", b"quantize", b"edited pass"):
        assert stage in shown, stage
    assert b"Loading weights" not in shown
    assert re.search(rb"ratio [\d.]+, [\d.]+ to [\d.]+, limit 1\.1, 4 of up to 256 windows, about \d+ s", shown)


def test_a_log_gets_a_line_per_stage_once_a_run_takes_long(invarlock, config, monkeypatch) -> None:
    monkeypatch.setattr("invarlock.cli.progress.SILENT_SECONDS", 0.0)
    done = invarlock("run", "-c", config(), "--out", "out")
    assert done.code == 0
    lines = done.err.splitlines()
    assert all(re.fullmatch(r"invarlock: [\w ]+(, \d+ %)?, \d+ s", line) for line in lines), done.err
    stages = [re.split("[:,] ?", line)[1].strip() for line in lines]
    assert [stage for stage in stages if stage.endswith("pass")] == ["baseline pass", "edited pass"]
    assert {"load", "quantize", "invariants", "page"} <= {*stages}


def test_a_stage_that_lasts_is_reported_again(capsys, monkeypatch) -> None:
    monkeypatch.setattr("invarlock.cli.progress.SILENT_SECONDS", 0.0)
    monkeypatch.setattr("invarlock.cli.progress.EVERY_SECONDS", 0.02)
    with display(shown=True) as tell:
        tell("edited pass", 3, 4)
        time.sleep(0.5)
    assert capsys.readouterr().err.count("invarlock: edited pass, 75 %, 0 s\n") >= 2


@pytest.mark.parametrize("options", [(), ("-q",)])
def test_a_short_run_and_a_quiet_one_print_no_progress(invarlock, config, monkeypatch, options) -> None:
    monkeypatch.setattr("invarlock.cli.progress.SILENT_SECONDS", 0.0 if options else 1e6)
    assert invarlock("run", "-c", config(), "--out", "out", *options).err == ""


def test_the_stages_add_up_to_the_run(invarlock, config) -> None:
    began = time.perf_counter()
    assert invarlock("run", "-c", config(output={"save_model": True}), "--out", "out").code == 0
    whole = time.perf_counter() - began
    timings = read_report(Path("out"))["timings"]
    assert {"startup", "save", "page", "other"} <= timings.keys()
    # The files are written after that, and the verdict is printed.
    assert 0.5 * whole < sum(timings.values()) < whole


def test_a_stage_inside_of_another_counts_once() -> None:
    clock = Clock()
    with clock.stage("outer"):
        time.sleep(0.05)
        with clock.stage("inner"):
            time.sleep(0.1)
    timings = clock.timings()
    assert 0.04 < timings["outer"] < timings["inner"]
    assert sum(timings.values()) == pytest.approx(time.perf_counter() - clock.began, abs=0.02)
