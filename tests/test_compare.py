"""``invarlock compare``: an edit that somebody else made, judged as a run's."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import DEMO, read_report
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.config.loading import load
from invarlock.pipeline import compare
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.quantization import Plan, Scheme, WeightLayout, fake_quantize_, quantize_model
from invarlock.quantization.grids import infer_grid
from invarlock.reporting.report import json_schema
from invarlock.testing import architectures

BASELINE = DEMO / "checkpoint"
SMALL = ("--set", "dataset.seq_len=64", "--set", "dataset.final_n=6", "--set", "dataset.preview_n=2")
TEXT = ("--dataset", DEMO / "text.jsonl")


def save(edit, folder: Path = Path("subject"), dtype: str = "bfloat16", tokenizer: bool = True) -> Path:
    model = AutoModelForCausalLM.from_pretrained(BASELINE, dtype=dtype)
    with torch.no_grad():
        edit(model)
    model.save_pretrained(folder)
    if tokenizer:
        AutoTokenizer.from_pretrained(BASELINE).save_pretrained(folder)
    return folder


def rtn(bitwidth: int, **options):
    return lambda model: quantize_model(model, Plan(bitwidth, scope="all", **options))


@pytest.mark.parametrize("source", [TEXT, ("--generated",), ("--weights-only",), ()])
def test_the_unedited_checkpoint_is_accepted_without_a_warning(invarlock, source) -> None:
    subject = save(lambda model: None)
    done = invarlock(
        "compare", "--baseline", BASELINE, "--subject", subject, *source, *SMALL, "--out", "out", "--strict"
    )
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert report["verdict"]["action"] == "continue"
    assert {module["change"] for module in report["edit"]["modules"]} == {"unchanged"}
    assert (report["metrics"]["primary"] is None) == (source == ("--weights-only",))


def test_eight_bits_are_accepted_and_told(invarlock) -> None:
    subject = save(rtn(8), dtype="float32")
    done = invarlock("compare", "--baseline", BASELINE, "--subject", subject, *TEXT, *SMALL, "--out", "out")
    assert done.code == 0, done.out + done.err
    families = {entry["family"]: entry["changes"] for entry in read_report(Path("out"))["edit"]["plan"]["families"]}
    assert families["model.layers.*.mlp.up_proj"] == {"a grid of 256 levels a row (8 bits)": 4}
    assert families["model.embed_tokens"] == {"unchanged": 1}


def test_two_bits_are_rejected_and_a_layer_that_was_left_out_stands_out(invarlock) -> None:
    subject = save(rtn(2, exclude=("*layers.1.mlp.up_proj",)), dtype="float32")
    before = {path: path.read_bytes() for folder in (BASELINE, subject) for path in folder.iterdir()}
    done = invarlock("compare", "--baseline", BASELINE, "--subject", subject, *TEXT, *SMALL, "--out", "out")
    assert done.code == 1
    families = {entry["family"]: entry["changes"] for entry in read_report(Path("out"))["edit"]["plan"]["families"]}
    assert families["model.layers.*.mlp.up_proj"] == {"a grid of 4 levels a row (2 bits)": 3, "unchanged": 1}
    assert {path: path.read_bytes() for path in before} == before, "both checkpoints are only read"
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "report.json"]


def test_json_is_the_report_whole_and_alone(invarlock) -> None:
    subject = save(lambda model: None)
    done = invarlock(
        "compare", "--baseline", BASELINE, "--subject", subject, "--weights-only", "--out", "out", "--json"
    )
    assert json.loads(done.out) == read_report(Path("out"))


@pytest.mark.parametrize(("limit", "status"), [(1.02, 1), (1.5, 0)])
def test_from_weights_alone_the_estimate_is_held_against_the_configured_limit(invarlock, limit, status) -> None:
    subject = save(rtn(4))
    limits = ("--weights-only", "--set", f"eval.max_pm_ratio={limit}", "--set", "guards.order=[reconstruction]")
    done = invarlock("compare", "--baseline", BASELINE, "--subject", subject, *limits, "--out", "out")
    assert done.code == status
    figures = read_report(Path("out"))["guards"][0]["metrics"]
    # Half of it, because the true rise may be twice the estimate.
    assert figures["max_score"] == pytest.approx(math.log(limit) / 2)
    assert (figures["score"] > figures["max_score"]) == (status == 1), done.out


def test_what_the_verdict_rests_on_is_said(invarlock) -> None:
    subject = save(lambda model: None)
    arguments = ("compare", "--baseline", BASELINE, "--subject", subject, *SMALL)
    assert "rests on weights alone" in invarlock(*arguments, "--weights-only").out
    assert "rests on 2 + 6 windows that the baseline wrote" in invarlock(*arguments).out
    assert "rests on 2 + 6 windows of the dataset" in invarlock(*arguments, *TEXT).out


def test_a_differing_vocabulary_is_said(invarlock) -> None:
    subject = save(lambda model: None)
    tokenizer = json.loads((subject / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    (subject / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = invarlock("compare", "--baseline", BASELINE, "--subject", subject, *TEXT, *SMALL, "--out", "out")
    assert done.code == 1
    assert "2 tokens have another id" in done.out


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda model: model.resize_token_embeddings(300), "the model knows only 300 tokens"),
        (lambda model: setattr(model.config, "max_position_embeddings", 32), "the model reads only 32"),
    ],
)
def test_a_subject_that_cannot_read_the_windows_is_not_measured_and_rejected(invarlock, edit, said: str) -> None:
    done = invarlock("compare", "--baseline", BASELINE, "--subject", save(edit), *TEXT, *SMALL, "--out", "out")
    assert done.code == 1, done.err
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert report["verdict"]["action"] == "abort"
    assert report["metrics"]["primary"] is None
    assert said in done.out


def test_a_subject_of_another_task_is_not_measured_and_rejected(invarlock) -> None:
    architectures.bert().save_pretrained("subject")
    done = invarlock("compare", "--baseline", BASELINE, "--subject", "subject", *TEXT, *SMALL, "--out", "out")
    assert done.code == 1, done.err
    assert "a masked model and the baseline a causal one" in done.out


@pytest.mark.parametrize("which", ["--baseline", "--subject"])
def test_a_checkpoint_that_is_not_there_is_one_line(invarlock, which: str) -> None:
    paths = {"--baseline": BASELINE, "--subject": BASELINE} | {which: "nowhere"}
    done = invarlock("compare", *(word for pair in paths.items() for word in pair), "--weights-only", "--out", "out")
    assert done.code == 2
    assert "nowhere" in done.err
    assert done.err.count("\n") == 1
    assert not Path("out").exists()


def test_an_output_inside_the_subject_is_refused(invarlock) -> None:
    subject = save(lambda model: None)
    done = invarlock("compare", "--baseline", BASELINE, "--subject", subject, "--out", subject / "out")
    assert done.code == 2
    assert "inside the input" in done.err


def test_one_model_is_in_memory_at_a_time(module, config) -> None:
    module(
        "counting",
        "import weakref\nfrom invarlock.core.api import ModelAdapter\nALIVE = []\nMOST = [0]\n"
        "class Counting(ModelAdapter):\n    name = 'counting'\n    def load_model(self, model_id):\n"
        "        from transformers import AutoModelForCausalLM\n"
        "        MOST[0] = max(MOST[0], 1 + sum(ref() is not None for ref in ALIVE))\n"
        "        model = AutoModelForCausalLM.from_pretrained(model_id, dtype='float32').eval()\n"
        "        ALIVE.append(weakref.ref(model))\n        return model\n",
    )
    settings = load(str(config(model={"id": str(BASELINE), "adapter": "counting"})))
    compare(settings, str(BASELINE), PluginManager.load(Selection.of(["counting"], autoload=True)), weights_only=True)
    import counting

    gc.collect()
    assert counting.MOST == [1]
    assert all(isinstance(ref, weakref.ref) for ref in counting.ALIVE) and len(counting.ALIVE) == 2


# -- the grid that a weight lies on ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bitwidth", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [None, 64])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_grid_is_read_off_the_numbers(dtype, bitwidth, group_size, symmetric) -> None:
    weight = (torch.randn(192, 512, generator=torch.Generator().manual_seed(1)) * 0.05).to(dtype)
    assert infer_grid(weight) is None
    fake_quantize_(weight, Scheme(bitwidth, symmetric=symmetric, group_size=group_size))
    grid = infer_grid(weight)
    assert (grid.bits, grid.group_size) == (bitwidth, group_size)


def test_a_grid_is_read_along_the_right_axis() -> None:
    model = architectures.gpt2()
    quantize_model(model, Plan(4, scope="all"))
    weight = model.transformer.h[0].attn.c_attn.weight
    assert infer_grid(weight, WeightLayout.IN_OUT).bits == 4
    assert infer_grid(weight, WeightLayout.OUT_IN) is None


def test_half_precision_is_no_grid() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert infer_grid(weight.to(torch.bfloat16).float()) is None
    assert infer_grid(torch.zeros(4, 64)) is None


@pytest.mark.parametrize(
    ("library", "config"), [("bitsandbytes", {"load_in_8bit": True}), ("bitsandbytes", {"load_in_4bit": True})]
)
def test_codes_of_other_libraries_are_judged_as_the_weights_that_they_stand_for(invarlock, library, config) -> None:
    pytest.importorskip(library)
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    packed = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", quantization_config=BitsAndBytesConfig(**config))
    packed.save_pretrained("packed")
    done = invarlock("compare", "--baseline", DEMO / "checkpoint", "--subject", "packed", "--generated", "--out", "out")
    assert done.code in (0, 1), done.err
    modules = read_report(Path("out"))["edit"]["modules"]
    changed = [module for module in modules if module["change"] != "unchanged"]
    assert len(changed) == 28
    assert all(0 < module["relative_error"] < 0.2 for module in changed)
