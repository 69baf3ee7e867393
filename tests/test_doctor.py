"""``invarlock doctor``: a healthy set-up has no problem, and each ailment is named with what to do."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import psutil
import pytest
from conftest import DEMO

SHARD = 2**33


def findings(done, status: str) -> dict[str, str]:
    """What was found, and what to do, by subject."""
    report = json.loads(done.out)
    assert report["format_version"] == "doctor-v1"
    return {
        each["subject"]: f"{each['what']} -> {each['todo']}" for each in report["findings"] if each["status"] == status
    }


def test_a_healthy_set_up_has_no_problem(invarlock, config) -> None:
    done = invarlock("doctor", "-c", config(), "--json")
    assert done.code == 0, done.out
    assert not findings(done, "problem")
    assert set(findings(done, "ok")) == {
        "versions",
        "plugins",
        "devices",
        "guards",
        "output",
        "memory",
        "disk",
        "model",
        "edit",
        "text",
        "hub",
    }
    assert "enough for 2 + 6 windows of 64 tokens" in findings(done, "ok")["text"]


def test_without_a_configuration_the_rest_is_said_to_be_not_checked(invarlock) -> None:
    done = invarlock("doctor", "--json")
    assert done.code == 0
    assert set(findings(done, "not checked")) == {"guards", "output", "memory", "disk", "model", "edit", "text", "hub"}
    assert "not checked  memory    there is no configuration\n" in invarlock("doctor").out


def test_a_requirement_that_is_not_met_is_a_problem(invarlock, site, config) -> None:
    site("xxhash", version="0.1")
    done = invarlock("doctor", "-c", config(), "--json")
    assert done.code == 1
    assert findings(done, "problem") == {
        "versions": "xxhash 0.1, and xxhash>=3.4 is needed -> pip install 'xxhash>=3.4'"
    }
    assert "install what is required first" in findings(done, "not checked")["memory"]


def test_a_broken_plugin_is_a_problem_that_can_be_turned_off(invarlock, site) -> None:
    site("lame", "[invarlock.guards]\nlame = lame:Guard\n", lame="raise RuntimeError('it limps')")
    done = invarlock("doctor", "--json")
    assert done.code == 1
    assert findings(done, "problem") == {
        "plugins": "guard lame: RuntimeError: it limps -> update or remove lame 1.0, or turn it off: -p no:lame"
    }
    done = invarlock("doctor", "-p", "no:lame", "--json")
    assert done.code == 0
    assert "lame" in findings(done, "not checked")["plugins"]


def test_a_plugin_that_lacks_a_distribution_is_a_warning(invarlock, site) -> None:
    source = "from invarlock.core.api import Guard\nclass Needy(Guard):\n    requires = ('no-such-thing',)\n    def validate(self, model, adapter, context): ...\n"
    site("needy", "[invarlock.guards]\nneedy = needy:Needy\n", needy=source)
    done = invarlock("doctor", "--json")
    assert done.code == 0
    assert "pip install no-such-thing" in findings(done, "warning")["plugins"]


@pytest.mark.parametrize(
    ("sections", "subject", "said"),
    [
        ({"guards": {"order": ["invariant"]}}, "guards", "did you mean 'invariants'?"),
        ({"guards": {"order": ["spectral"], "spectral": {"sigm": 1}}}, "guards", "no such option"),
        ({"plugins": ["nowhere_to_be_found"]}, "plugins", "unknown plugin or module"),
        ({"dataset": {"provider": "demo", "seq_len": 256, "final_n": 9000}}, "text", "lower dataset.preview_n"),
        ({"dataset": {"provider": "local_jsonl", "path": "nowhere.jsonl"}}, "text", "nowhere.jsonl does not exist"),
        ({"model": {"id": str(DEMO / "checkpoint"), "device": "cuda:93"}}, "devices", "cuda:93"),
    ],
)
def test_what_a_configuration_lacks_is_a_problem(invarlock, config, sections, subject: str, said: str) -> None:
    done = invarlock("doctor", "-c", config(**sections), "--json")
    assert done.code == 1, done.out
    assert list(findings(done, "problem")) == [subject]
    assert said in findings(done, "problem")[subject]


def test_a_model_larger_than_memory_and_disk_is_a_problem(invarlock, config) -> None:
    """Twice what is free, in shards that are holes: their headers alone are read."""
    count = 2 * (shutil.disk_usage(".").free + psutil.virtual_memory().available) // SHARD
    Path("huge").mkdir()
    names = {f"w{number}": f"model-{number}.safetensors" for number in range(count)}
    for name, file in names.items():
        header = json.dumps({name: {"dtype": "F32", "shape": [SHARD // 4], "data_offsets": [0, SHARD]}}).encode()
        Path("huge", file).write_bytes(len(header).to_bytes(8, "little") + header)
        os.truncate(Path("huge", file), 8 + len(header) + SHARD)
    Path("huge/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    sections = {"model": {"id": "huge"}, "output": {"dir": "out", "save_model": True}, "dataset": {}}
    done = invarlock("doctor", "-c", config(**sections), "--json")
    assert done.code == 1, done.out
    problems = findings(done, "problem")
    assert f"({8 * count}.00 GiB of weights)" in problems["memory"]
    assert "invarlock run --stream" in problems["memory"]
    assert "choose another output.dir" in problems["disk"]
    assert not Path("out").exists()


def test_a_containers_limit_is_held_against_the_model(invarlock, config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("invarlock.core.memory.CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{2**30}\n")
    (tmp_path / "memory.current").write_text(f"{2**29}\n")
    done = invarlock("doctor", "-c", config(), "--json")
    assert done.code == 1
    assert "0.50 GiB of memory are free" in findings(done, "problem")["memory"]
    (tmp_path / "memory.max").write_text("max\n")
    assert invarlock("doctor", "-c", config()).code == 0


def test_a_model_that_is_not_here_is_not_looked_for_on_the_network(invarlock, config) -> None:
    done = invarlock("doctor", "-c", config(model={"id": "somebody/model"}), "--json")
    assert done.code == 1
    assert set(findings(done, "problem")) == {"model", "hub"}
    assert "--allow-network" in findings(done, "problem")["hub"]


def test_a_broken_checkpoint_is_a_problem(invarlock, config) -> None:
    shutil.copytree(DEMO / "checkpoint", "broken")
    Path("broken/model.safetensors").write_bytes(b"x" * 100)
    done = invarlock("doctor", "-c", config(model={"id": "broken"}), "--json")
    assert done.code == 1
    assert "broken: model.safetensors" in findings(done, "problem")["memory"]


def test_a_configuration_that_is_none_is_a_usage_error(invarlock) -> None:
    done = invarlock("doctor", "-c", "nowhere.yaml", "--json")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
