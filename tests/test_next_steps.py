"""Steps to take next after a rejection or a warning, found in the report, which work once they are pasted."""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from conftest import DEMO, read_report
from transformers import AutoModelForCausalLM

from invarlock.reporting.next_steps import next_steps
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import json_schema

BASELINE = DEMO / "checkpoint"
RUN = ("run", "--demo", "--set", "dataset.final_n=8", "--out", "out", "--force")
COMPARE = ("--set", "dataset.seq_len=64", "--set", "dataset.final_n=6", "--set", "dataset.preview_n=2", "--out", "out")


def steps() -> list[dict[str, str]]:
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    return report["what_next"]


def options() -> list[str]:
    return [step["option"] for step in steps()]


def steps_of(report: dict[str, Any]) -> list[str]:
    return [step.option for step in next_steps(SavedReport(report).report)]


@pytest.fixture
def rejected(invarlock) -> dict[str, Any]:
    """The report of a run at 2 bits, which keeps a module out already."""
    assert invarlock(*RUN, "--set", "edit.plan.bitwidth=2", "--set", 'edit.plan.exclude=["*.0.mlp.up_proj"]').code == 1
    return read_report(Path("out"))


def compared(invarlock, edit, *more: str) -> int:
    model = AutoModelForCausalLM.from_pretrained(BASELINE, dtype="bfloat16")
    with torch.no_grad():
        edit(model)
    model.save_pretrained("subject")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASELINE / name, "subject")
    text = ("--dataset", DEMO / "text.jsonl")
    return invarlock("compare", "--baseline", BASELINE, "--subject", "subject", *text, *COMPARE, *more).code


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_rejected_run_names_bits_modules_and_groups_that_can_be_pasted(invarlock, rejected) -> None:
    bits, modules, groups = options()
    assert (bits, groups) == ("--set edit.plan.bitwidth=3", "--set edit.plan.group_size=64")
    (_, setting) = shlex.split(modules)
    excluded = json.loads(setting.removeprefix("edit.plan.exclude="))
    suspects = [suspect["module"] for suspect in rejected["verdict"]["suspects"]]
    assert excluded == ["*.0.mlp.up_proj", *suspects[:3]]
    for option in (bits, groups, modules):
        assert invarlock(*RUN, "--set", "edit.plan.bitwidth=2", *shlex.split(option)).code in (0, 1)
    assert {*suspects[:3]}.isdisjoint(weight["name"] for weight in read_report(Path("out"))["edit"]["modules"])


def test_every_rendering_has_them(invarlock, rejected) -> None:
    for format_ in ("terminal", "markdown", "html", "junit"):
        shown = invarlock("report", "out", "--format", format_).out.replace("<wbr/>", "")
        assert "--set edit.plan.bitwidth=3" in shown, format_
    assert (
        "next     one more bit halves the rounding error: --set edit.plan.bitwidth=3\n"
        in invarlock("report", "out").out
    )
    assert "- one more bit halves the rounding error: `--set edit.plan.bitwidth=3`\n" in (
        invarlock("report", "out", "--format", "markdown").out
    )


def test_an_accepted_run_has_none(invarlock) -> None:
    assert invarlock(*RUN).code == 0
    assert steps() == []
    assert "next  " not in invarlock("report", "out").out


def test_the_widest_plan_gets_no_more_bits_and_the_finest_groups_no_finer_ones(rejected) -> None:
    rejected["edit"]["plan"] |= {"bitwidth": 8, "group_size": 32}
    assert [option.partition("=")[0] for option in steps_of(rejected)] == ["--set 'edit.plan.exclude"]


def test_a_format_of_one_scheme_is_offered_no_other(rejected) -> None:
    rejected["config"]["output"] |= {"save_model": True, "format": "gguf"}
    assert not [option for option in steps_of(rejected) if "bitwidth" in option or "group_size" in option]


def test_a_format_of_floats_is_offered_no_other_bits(rejected) -> None:
    rejected["edit"]["plan"]["format"] = "mxfp4"
    assert not [option for option in steps_of(rejected) if "bitwidth" in option or "group_size" in option]


def test_an_interval_that_holds_the_limit_asks_for_the_windows_that_decide(rejected) -> None:
    metric = rejected["metrics"]["primary"]
    undecided = {"below": 1.05, "above": 1.15, "windows": 32, "message": ""}
    metric |= {"ratio": 1.08, "ci": [1.04, 1.12], "windows": 8, "limit": 1.10, "undecided": undecided}
    assert not [option for option in steps_of(rejected) if "final_n" in option], "what else rejects it would stay"
    rejected["verdict"]["ending"] = "inconclusive"
    assert steps_of(rejected)[0] == "--set dataset.final_n=32"
    undecided["windows"] = None
    assert not [option for option in steps_of(rejected) if "final_n" in option], "a ratio at its limit stays there"


def test_a_guard_that_failed_is_left_out(rejected) -> None:
    broken = copy.deepcopy(rejected)
    broken["guards"][1] |= {"error": "Traceback", "action": "abort"}
    names = [guard["name"] for guard in broken["guards"] if guard["name"] != broken["guards"][1]["name"]]
    assert shlex.split(steps_of(broken)[0]) == ["--set", f"guards.order=[{', '.join(names)}]"]


# -- comparisons -------------------------------------------------------------------------------------------------------


def test_a_rejected_comparison_names_the_tensors_to_take_back(invarlock) -> None:
    name = "model.layers.1.mlp.down_proj"
    assert compared(invarlock, lambda model: model.get_submodule(name).weight.neg_()) == 1
    assert json.loads(options()[0]) == [name]


def test_a_warning_has_steps_too(invarlock) -> None:
    def clear(model: Any) -> None:
        model.get_submodule("model.layers.3.mlp.up_proj").weight[:2] = 0

    code = compared(invarlock, clear, "--strict")
    assert (code, read_report(Path("out"))["verdict"]["action"]) == (1, "warn")
    assert json.loads(options()[0]) == ["model.layers.3.mlp.up_proj"]
    assert options()[-1] == "--set dataset.final_n=12"


def test_a_gap_that_the_edit_touches_is_closed_by_the_first_step(invarlock) -> None:
    def longer(model: Any) -> None:
        model.config.max_position_embeddings = 512

    assert compared(invarlock, longer, "--strict") == 1
    assert options()[0] == "--set dataset.seq_len=512"


def test_weights_alone_ask_for_outputs(invarlock) -> None:
    def noise(model: Any) -> None:
        model.get_submodule("model.layers.1.mlp.down_proj").weight.zero_()

    model = AutoModelForCausalLM.from_pretrained(BASELINE, dtype="bfloat16")
    with torch.no_grad():
        noise(model)
    model.save_pretrained("subject")
    done = invarlock("compare", "--baseline", BASELINE, "--subject", "subject", "--weights-only", *COMPARE)
    assert done.code == 1
    assert "--generated" in options()


def test_whatever_objects_there_is_a_step() -> None:
    verdict = {"action": "rollback", "accepted": False, "decided_by": "a plugin", "findings": []}
    assert steps_of({"format_version": "report-v1", "verdict": verdict}) == ["--verbose"]
