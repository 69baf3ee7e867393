"""``invarlock reference``: a baseline measured once, in place of its pass in a run or a comparison."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import tiny_models
import torch
from conftest import DEMO, read_report, slow
from safetensors.torch import load_file, save_file

from invarlock.checkpoints import tensor_tree
from invarlock.checkpoints.checksums import digest_of
from invarlock.reporting.report import json_schema

GUARDS = ["invariants", "serving", "reconstruction", "spectral", "rmt", "variance"]
BASELINE = DEMO / "checkpoint"
OBSERVER = """
import tiny_models
import torch
from invarlock import hookimpl

class Tap:
    def __call__(self, module, args, kwargs, output):
        self.seen = float(output.abs().max())
    def result(self):
        return RESULT

class observer:
    @hookimpl
    def invarlock_observe(self, model):
        return {"model.layers.0.mlp": Tap()}
    @hookimpl
    def invarlock_validate(self, context):
        seen = context["observations"]
        return {"passed": True, "action": "continue", "message": str(seen["baseline"]), "metrics": {}}

import sys
hooks = observer()
invarlock_observe, invarlock_validate = hooks.invarlock_observe, hooks.invarlock_validate
"""


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> dict[tuple, Path]:
    """References by what they were made with: making one takes as long as a run."""
    return {}


@pytest.fixture
def made(invarlock, config, kept, tmp_path_factory):
    """Write a configuration and a reference of the demo model; returns the reference's folder and the configuration."""

    def make(*arguments: str, **sections) -> tuple[Path, Path]:
        path = config(**({"guards": {"order": ["invariants"]}} | sections))
        key = arguments, path.read_text()
        if key not in kept:
            kept[key] = tmp_path_factory.mktemp("references") / "ref"
            done = invarlock("reference", BASELINE, "-c", path, "--out", kept[key], "-q", *arguments)
            assert done.code == 0, done.err
        shutil.copytree(kept[key], "ref")
        return Path("ref"), path

    return make


def figures(folder: Path) -> dict:
    """The outputs and the guards of a report, without the seconds."""
    report = read_report(folder)
    guards = [{**guard, "seconds": None} for guard in report["guards"]]
    return {"guards": guards} | {name: report[name] for name in ("metrics", "verdict", "coverage", "edit", "model")}


def refused(invarlock, *arguments: str | Path) -> str:
    done = invarlock(*arguments, "--reference", "ref", "--out", "refused")
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert not Path("refused/report.json").exists()
    return done.err


# -- the same verdict --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, *slow(8)])
def test_a_run_comes_to_the_same_verdict_bit_for_bit(invarlock, made, bits) -> None:
    reference, path = made(guards={"order": GUARDS})
    arguments = ("run", "-c", path, "--set", f"edit.plan.bitwidth={bits}")
    codes = [
        invarlock(*arguments, "--out", "without").code,
        invarlock(*arguments, "--reference", reference, "--out", "with").code,
    ]
    assert codes[0] == codes[1] == (bits == 2)
    assert figures(Path("with")) == figures(Path("without"))
    report = read_report(Path("with"))
    jsonschema.validate(report, json_schema())
    assert report["reference"]["digest"] == digest_of(reference / "SHA256SUMS")
    assert report["reference"]["pass_again"] == ""
    assert "baseline pass" not in report["timings"]
    assert read_report(Path("without"))["reference"] is None


def test_a_comparison_needs_neither_the_text_nor_the_pass(invarlock, made, tmp_path) -> None:
    subject = tmp_path / "subject"
    shutil.copytree(BASELINE, subject)
    tensors = load_file(subject / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.05
    save_file(tensors, subject / "model.safetensors", {"format": "pt"})
    text = tmp_path / "text.jsonl"
    shutil.copyfile(DEMO / "text.jsonl", text)
    dataset = {"provider": "local_jsonl", "path": str(text), "seq_len": 64, "preview_n": 2, "final_n": 6}
    reference, path = made(dataset=dataset, guards={"order": GUARDS})
    arguments = ("compare", "--baseline", BASELINE, "--subject", subject, "-c", path)
    assert invarlock(*arguments, "--out", "without").code == 0
    done = invarlock(*arguments, "--reference", reference, "--out", "with")
    assert done.code == 0, done.err
    assert figures(Path("with")) == figures(Path("without"))
    assert "reference ref, SHA-256 " in done.out
    assert invarlock("verify", "with").code == 0
    text.write_text(text.read_text() + "\n")
    assert "another dataset.path; make it again" in refused(invarlock, *arguments)


def test_windows_that_the_baseline_wrote_are_not_written_again(invarlock, made) -> None:
    reference, path = made(dataset={"provider": "generated", "seq_len": 32, "preview_n": 1, "final_n": 4})
    assert invarlock("run", "-c", path, "--out", "without").code == 0
    assert invarlock("run", "-c", path, "--reference", reference, "--out", "with").code == 0
    assert figures(Path("with")) == figures(Path("without"))
    assert "windows" not in read_report(Path("with"))["timings"]


def test_windows_are_measured_step_by_step_until_the_limits_are_certain(invarlock, made) -> None:
    dataset = {"provider": "demo", "seq_len": 64, "preview_n": 2, "max_n": 16}
    reference, path = made(dataset=dataset, guards={"order": ["variance"]})
    arguments = ("run", "-c", path, "--set", "edit.plan.bitwidth=2")
    assert invarlock(*arguments, "--out", "without").code == 1
    assert invarlock(*arguments, "--reference", reference, "--out", "with").code == 1
    assert figures(Path("with")) == figures(Path("without"))
    assert 4 <= read_report(Path("with"))["metrics"]["primary"]["windows"] < 16
    compare = ("compare", "--baseline", BASELINE, "--subject", BASELINE, "-c", path)
    assert invarlock(*compare, "--out", "c-without").code == 0
    assert invarlock(*compare, "--reference", reference, "--out", "c-with").code == 0
    assert figures(Path("c-with")) == figures(Path("c-without"))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.dtype=bfloat16", "data type (float32 there, bfloat16 here)"),
        ("dataset.seq_len=32", "dataset.seq_len (64 there, 32 here)"),
        ("dataset.seed=1", "dataset.seed (42 there, 1 here)"),
        *slow(("dataset.final_n=8", "dataset.final_n (6 there, 8 here)"), ("dataset.chat=never", "dataset.chat (")),
    ],
)
def test_other_keys_are_refused(invarlock, made, setting, said) -> None:
    _, path = made()
    assert said in refused(invarlock, "run", "-c", path, "--set", setting)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model.safetensors", lambda path: scale_a_weight(path), "another set of weights"),
        ("tokenizer.json", lambda path: swap_words(path), "another tokenizer"),
        ("config.json", lambda path: set_key(path, "rms_norm_eps", 1e-3), "another configuration of the model"),
    ],
)
def test_another_checkpoint_is_refused(invarlock, made, tmp_path, file, change, said) -> None:
    _, path = made()
    other = tmp_path / "other"
    shutil.copytree(BASELINE, other)
    change(other / file)
    assert said in refused(invarlock, "run", "-c", path, "--set", f"model.id={other}")


def test_what_computes_has_to_be_the_same(invarlock, made) -> None:
    reference, path = made()
    others = {"version of torch": "1.0", "version of transformers": "1.0", "version of invarlock": "9", "device": "mps"}
    forge(reference, lambda tree: tree["rests_on"].update(others))
    said = refused(invarlock, "run", "-c", path)
    assert all(f"{fact} ({value} there, " in said for fact, value in others.items())


def test_a_copy_of_the_checkpoint_is_the_same_baseline(invarlock, made, tmp_path) -> None:
    _, path = made()
    shutil.copytree(BASELINE, tmp_path / "copy")
    setting = f"model.id={tmp_path / 'copy'}"
    assert invarlock("run", "-c", path, "--set", setting, "--reference", "ref", "--out", "out").code == 0


def scale_a_weight(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 1.5
    save_file(tensors, path, {"format": "pt"})


def swap_words(path: Path) -> None:
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["A"], words["B"] = words["B"], words["A"]
    path.write_text(json.dumps(tokenizer))


def set_key(path: Path, key: str, value: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


# -- damage ------------------------------------------------------------------------------------------------------------


def forge(reference: Path, change) -> None:
    """Change a reference as somebody would who makes the digests fit."""
    tree, _ = tensor_tree.read(reference, "reference.json")
    change(tree)
    shutil.rmtree(reference)
    tensor_tree.write(reference, "reference.json", tree)


FORGERIES = {
    "other losses": lambda tree: tree["steps"][0]["pass"].update(losses=torch.zeros(3, dtype=torch.float64)),
    "NaN": lambda tree: tree["steps"][0]["pass"]["losses"].fill_(float("nan")),
    "a type": lambda tree: tree["steps"][0]["pass"].update(tokens=tree["steps"][0]["pass"]["tokens"].float()),
    "no record": lambda tree: tree["steps"][0].update(record=None),
    "a longer record": lambda tree: tree["steps"][0]["record"].update(
        tokens=tree["steps"][0]["record"]["tokens"].repeat(2, 1)
    ),
    "unknown tokens": lambda tree: tree["steps"][0]["record"]["tokens"].fill_(1 << 30),
    "unknown ids": lambda tree: tree["windows"][1]["input_ids"].fill_(1 << 30),
    "fewer windows": lambda tree: tree["windows"][1].update(labels=tree["windows"][1]["labels"][:2]),
    "no labels": lambda tree: tree["windows"][1].update(labels=torch.full_like(tree["windows"][1]["labels"], -100)),
    "unknown labels": lambda tree: tree["windows"][1].update(labels=tree["windows"][1]["labels"] + 5000),
    "a small vocabulary": lambda tree: tree["steps"][0]["record"].update(vocabulary=40),
    "experts": lambda tree: tree.update(experts=["all"]),
    "other steps": lambda tree: tree["steps"][0].update(look=5),
    "a key": lambda tree: tree.pop("guards"),
    "a version": lambda tree: tree.update(format_version="reference-v0"),
    "a list": lambda tree: tree.update(windows=[]),
    "text": lambda tree: tree.update(noise="none"),
    "digests": lambda tree: tree["by_mark"].update(all="equal"),
}


@pytest.mark.parametrize("name", ["NaN", "no record", "unknown ids", "no labels", "other steps", *slow(*FORGERIES)])
def test_a_forged_reference_is_refused(invarlock, made, name) -> None:
    reference, path = made()
    forge(reference, FORGERIES[name])
    assert "--reference: " in refused(invarlock, "run", "-c", path)


def test_digests_of_tensors_are_taken_over_where_there_are_any(invarlock, made) -> None:
    reference, path = made()
    assert invarlock("run", "-c", path, "--reference", reference, "--out", "with").code == 0
    forge(reference, lambda tree: tree.pop("by_mark"))
    assert invarlock("run", "-c", path, "--reference", reference, "--out", "without").code == 0
    assert figures(Path("with")) == figures(Path("without"))
    shutil.rmtree(reference)
    reference, path = made()
    forge(reference, lambda tree: tree.update(by_mark=dict.fromkeys(tree["by_mark"], "0" * 32)))
    assert "another set of weights; make it again" in refused(invarlock, "run", "-c", path)


DAMAGES = {
    "cut tensors": lambda folder: cut(folder / "tensors.safetensors"),
    "cut text": lambda folder: cut(folder / "reference.json"),
    "no tensors": lambda folder: (folder / "tensors.safetensors").unlink(),
    "no digests": lambda folder: (folder / "SHA256SUMS").unlink(),
    "no folder": lambda folder: shutil.rmtree(folder),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_reference_is_refused(invarlock, made, damage) -> None:
    reference, path = made()
    damage(reference)
    assert "make it again with invarlock reference" in refused(invarlock, "run", "-c", path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def test_nothing_is_overwritten(invarlock, made) -> None:
    _, path = made()
    kept = Path("ref/reference.json").read_bytes()
    again = invarlock("reference", BASELINE, "-c", path, "--out", "ref")
    assert again.code == 2 and "is there already" in again.err
    assert "inside the input" in refused_output(invarlock, path, "ref/out")
    assert "ref is there already" in again.err
    assert Path("ref/reference.json").read_bytes() == kept


def refused_output(invarlock, path: Path, out: str) -> str:
    done = invarlock("run", "-c", path, "--reference", "ref", "--out", out)
    assert done.code == 2
    return done.err


def test_a_reference_is_not_written_into_a_checkpoint(invarlock, config, tmp_path) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(BASELINE, checkpoint)
    done = invarlock("reference", checkpoint, "-c", config(), "--out", checkpoint / "ref")
    assert done.code == 2 and "inside the input checkpoint" in done.err
    assert not (checkpoint / "ref").exists()


@pytest.mark.parametrize("option", ["--stream", "--weights-only"])
def test_a_run_without_the_pass_takes_no_reference(invarlock, config, option) -> None:
    command = ("run",) if option == "--stream" else ("compare", "--baseline", BASELINE, "--subject", BASELINE)
    done = invarlock(*command, "-c", config(), option, "--reference", "ref")
    assert done.code == 2 and done.err.startswith("invarlock: error: --reference: ")


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("result", "kept"), [("{'largest': self.seen}", True), ("object()", False), ("None", False)])
def test_observations_of_a_plugin_are_kept_or_the_pass_runs(invarlock, config, module, result, kept) -> None:
    module("observer", OBSERVER.replace("RESULT", result))
    path = config(guards={"order": ["observer"]}, plugins=["observer"])
    made = invarlock("reference", BASELINE, "-c", path, "--out", "ref")
    assert made.code == 0
    assert ("runs with this guard run the baseline's pass again" in made.err) != kept
    done = invarlock("run", "-c", path, "--reference", "ref", "--out", "with")
    assert done.code == 0, done.err
    assert ("the baseline's pass is run" in done.err) != kept
    report = read_report(Path("with"))
    assert ("baseline pass" in report["timings"]) != kept
    assert (report["reference"]["pass_again"] == "") == kept
    assert ("largest" in report["guards"][0]["message"]) == kept


def test_a_guard_with_other_options_has_the_pass_run(invarlock, made) -> None:
    reference, path = made(guards={"order": ["variance"]})
    arguments = ("run", "-c", path, "--set", "guards.variance.max_calib=8", "--reference", reference, "--out", "with")
    assert invarlock(*arguments).code == 0
    assert "guard variance" in read_report(Path("with"))["reference"]["pass_again"]


# -- the noise floor ---------------------------------------------------------------------------------------------------


def test_a_difference_below_the_noise_floor_is_said_to_be_that(invarlock, made) -> None:
    reference, path = made("--noise")
    compare = ("compare", "--baseline", BASELINE, "--subject", BASELINE, "-c", path, "--reference", reference)
    same = invarlock(*compare, "--out", "same")
    assert "the difference is below what the machine itself makes" in same.out
    rounded = invarlock("run", "-c", path, "--set", "edit.plan.bitwidth=4", "--reference", reference, "--out", "four")
    assert "the difference is above what the machine itself makes" in rounded.out
    noise = read_report(Path("same"))["metrics"]["noise"]
    batches, halved = noise["runs"]
    assert batches["how"] == "in batches of 1" and halved["how"] == "in bfloat16"
    assert 0 <= batches["figure"] < halved["figure"] and 0 < halved["kl_mean"] < 0.01
    assert "what the machine itself makes" in Path("same/report.html").read_text()


def test_a_reference_is_small(made) -> None:
    reference, _ = made(guards={"order": GUARDS})
    assert sum(path.stat().st_size for path in reference.iterdir()) < 4e6


@pytest.mark.parametrize(
    "name",
    [
        "CLIPModel",
        *slow("BertModel", "BertForMaskedLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration"),
        *slow("BertForSequenceClassification", "Qwen2VLForConditionalGeneration", "JambaForCausalLM"),
    ],
)
def test_every_kind_of_models_has_references(invarlock, name) -> None:
    model = tiny_models.save(tiny_models.MODELS[name](), Path("tiny"))
    keys = ("dataset.seq_len=32", "dataset.preview_n=2", "dataset.max_n=12", "guards.order=[variance]")
    settings = [word for key in keys for word in ("--set", key)]
    assert invarlock("reference", model, *settings, "--noise", "--out", "ref").code == 0
    compare = ("compare", "--baseline", model, "--subject", model, *settings)
    assert invarlock(*compare, "--out", "without").code in (0, 1)
    done = invarlock(*compare, "--reference", "ref", "--out", "with")
    assert done.code in (0, 1), done.err
    there, here = figures(Path("without")), figures(Path("with"))
    assert here["metrics"].pop("noise") and there["metrics"].pop("noise") is None
    assert here == there
