"""A run, from a configuration to a verdict, on real models through the real command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import pytest
import torch
from conftest import DEMO, read_report, slow
from forked import NO_READER
from safetensors.torch import load_file

from invarlock.config.loading import load
from invarlock.config.schema import GuardsConfig
from invarlock.models.fingerprint import Fingerprint
from invarlock.pipeline import run
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.reporting.report import json_schema
from invarlock.testing import architectures


def guard_module(body: str, prepare: str = "return {'ready': True}") -> str:
    return (
        "import torch\nfrom invarlock import hookimpl\n"
        f"@hookimpl\ndef invarlock_prepare(model, calib, policy):\n    {prepare}\n"
        f"@hookimpl\ndef invarlock_validate(model, context):\n    {body}\n"
    )


PASS = "return {'passed': True, 'action': 'continue', 'message': 'fine'}"

# -- the verdict -------------------------------------------------------------------------------------------------------


def test_the_demo_is_accepted_and_says_so(invarlock) -> None:
    done = invarlock("run", "--demo", "--out", "out")
    assert done.code == 0
    assert done.out.startswith("ACCEPTED (continue)")
    assert done.err == ""
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert report["verdict"]["accepted"] is True
    assert report["model"]["fingerprint_before"] != report["model"]["fingerprint_after"]
    assert len(report["edit"]["modules"]) == 28
    assert report["metrics"]["primary"]["ci"][1] < 1.01


def test_two_bits_are_rejected_and_the_baseline_restored(invarlock) -> None:
    done = invarlock("run", "--demo", "--set", "edit.plan.bitwidth=2", "--out", "out")
    assert done.code == 1
    assert done.out.startswith("REJECTED (rollback): decided by primary metric")
    assert "above the limit 1.1" in done.out
    assert "restored bit for bit" in done.out
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert report["model"]["restored"] is True
    assert report["model"]["fingerprint_before"] == report["model"]["fingerprint_after"]


@pytest.mark.parametrize("architecture", architectures.ARCHITECTURES)
def test_every_architecture_runs_on_windows_of_its_own(architecture: str, tmp_path: Path, config, invarlock) -> None:
    folder = tmp_path / "checkpoint"
    getattr(architectures, architecture)().save_pretrained(folder)
    if architecture == "bert":
        save_bert_tokenizer(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    path = config(
        model={"id": str(folder), "device": "cpu"},
        dataset={"seq_len": 16, "preview_n": 2, "final_n": 4},
        guards={},
        output={"save_model": True, "format": "dequantized"},
    )
    done = invarlock("run", "-c", path, "--out", "out", "--strict")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert [guard["action"] for guard in report["guards"]] == ["continue"] * 5
    assert report["metrics"]["predictions"]["action"] == "continue"
    assert report["metrics"]["primary"]["ratio"] == pytest.approx(1.0, abs=0.05)
    assert report["model"]["adapter"] == {"bert": "hf_mlm", "t5": "hf_seq2seq"}.get(architecture, "hf_causal")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "the input is never touched"
    saved, original = load_file(Path("out/model/model.safetensors")), load_file(folder / "model.safetensors")
    assert saved.keys() == original.keys()
    assert {name for name in saved if not torch.equal(saved[name], original[name])}
    assert report["artifacts"].keys() >= {"model/model.safetensors", "model/config.json"}


def save_bert_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(90))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.parametrize("strict", [False, True])
def test_a_warning_is_kept_and_strict_makes_it_exit_status_1(invarlock, module, config, strict: bool) -> None:
    module("warner", guard_module("return {'passed': True, 'action': 'warn', 'message': 'hm', 'warnings': ['w']}"))
    path = config(guards={"order": ["warner"]}, output={"save_model": True})
    done = invarlock("run", "-c", path, "-p", "warner", "--out", "out", *(["--strict"] if strict else []))
    assert done.code == (1 if strict else 0)
    report = read_report(Path("out"))
    assert report["verdict"]["accepted"] is True
    assert report["verdict"]["decided_by"] == "guard warner"
    assert report["guards"][0]["warnings"] == ["w"]
    assert Path("out/model/model.safetensors").exists()


@pytest.mark.parametrize("action", ["rollback", "abort"])
def test_a_rejected_edit_is_never_saved(invarlock, module, config, action: str) -> None:
    module("objector", guard_module(f"return {{'passed': False, 'action': '{action}', 'message': 'no'}}"))
    path = config(guards={"order": ["objector", "invariants"]}, output={"save_model": True})
    done = invarlock("run", "-c", path, "-p", "objector", "--out", "out")
    assert done.code == 1
    assert sorted(path.name for path in Path("out").iterdir()) == ["report.html", "report.json"]
    report = read_report(Path("out"))
    assert report["verdict"]["action"] == action
    assert report["guards"][1]["passed"] is True, "one guard's objection does not hide what the others found"


def test_rollback_retries_with_one_more_bit(invarlock, config) -> None:
    path = config(edit={"plan": {"bitwidth": 2, "scope": "all"}, "retry": {"max_attempts": 6}})
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 0
    attempts = read_report(Path("out"))["attempts"]
    assert [attempt["bitwidth"] for attempt in attempts] == list(range(2, 2 + len(attempts)))
    assert [attempt["action"] for attempt in attempts[:-1]] == ["rollback"] * (len(attempts) - 1)
    assert len(attempts) > 1
    assert "attempt  1 at 2 bits: rollback" in done.out


def test_abort_does_not_retry(invarlock, module, config) -> None:
    module("aborter", guard_module("return {'passed': False, 'action': 'abort'}"))
    path = config(guards={"order": ["aborter"]}, edit={"retry": {"max_attempts": 3}, "plan": {"bitwidth": 4}})
    invarlock("run", "-c", path, "-p", "aborter", "--out", "out")
    assert len(read_report(Path("out"))["attempts"]) == 1


# -- guards ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise ZeroDivisionError('a bug')", "ZeroDivisionError: a bug"), ("return None", "NoneType"),
        ("return {'message': 'all good'}", "passed"), ("return {'passed': True, 'action': 'explode'}", "explode"),
    ],
)  # fmt: skip
def test_a_guard_that_fails_is_an_abort_with_its_reason(invarlock, module, config, body: str, said: str) -> None:
    module("failing", guard_module(body))
    done = invarlock("run", "-c", config(guards={"order": ["failing", "invariants"]}), "-p", "failing", "--out", "out")
    assert done.code == 3
    report = read_report(Path("out"))
    assert report["guards"][0]["action"] == "abort"
    assert said in report["guards"][0]["error"]
    assert report["guards"][1]["passed"] is True
    assert said in done.out


@pytest.mark.parametrize(
    ("prepare", "said", "code"),
    [("return {'ready': False, 'message': 'no data'}", "no data", 1), ("raise KeyError('x')", "KeyError", 3), ("return 5", "int", 3)],
)  # fmt: skip
def test_a_guard_that_is_not_ready_aborts_before_the_edit(invarlock, module, config, prepare, said, code) -> None:
    module("unready", guard_module(PASS, prepare))
    path = config(guards={"order": ["unready", "invariants"]})
    done = invarlock("run", "-c", path, "-p", "unready", "--out", "out")
    assert done.code == code
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert report["verdict"]["action"] == "abort"
    assert report["edit"]["modules"] == []
    assert report["metrics"]["primary"] is None
    assert said in report["guards"][0]["message"]
    assert report["guards"][1]["passed"] is None, "what was not run does not count as passed"
    assert "not measured" in done.out


@pytest.mark.parametrize("when", ["prepare", "validate"])
def test_a_guard_that_changes_the_model_is_named_and_its_change_undone(invarlock, module, config, when: str) -> None:
    change = "next(model.parameters()).data.mul_(3)"
    module("meddler", guard_module(f"{change if when == 'validate' else ''}\n    {PASS}", f"{change if when == 'prepare' else ''}\n    return {{'ready': True}}"))  # fmt: skip
    module("witness", guard_module("return {'passed': True, 'metrics': {'sum': next(model.parameters()).sum()}}"))
    path = config(guards={"order": ["witness", "meddler", "witness"]})
    done = invarlock("run", "-c", path, "-p", "meddler", "-p", "witness", "--out", "out")
    assert done.code == 3
    report = read_report(Path("out"))
    first, meddler, last = report["guards"]
    assert meddler["action"] == "abort"
    assert "changed the model" in meddler["message"]
    assert "embed_tokens.weight" in meddler["message"]
    assert first["metrics"] == last["metrics"]
    assert report["model"]["restored"] is True


def test_a_name_listed_twice_runs_twice(invarlock, config) -> None:
    path = config(guards={"order": ["invariants", "hello_guard", "invariants"]})
    assert invarlock("run", "-c", path, "--out", "out").code == 0
    names = [guard["name"] for guard in read_report(Path("out"))["guards"]]
    assert names == ["invariants", "hello_guard", "invariants"]


def test_fail_fast_leaves_the_rest_unmeasured(invarlock, module, config) -> None:
    module("objector", guard_module("return {'passed': False, 'action': 'rollback'}"))
    path = config(guards={"order": ["objector", "invariants"], "fail_fast": True})
    invarlock("run", "-c", path, "-p", "objector", "--out", "out")
    later = read_report(Path("out"))["guards"][1]
    assert later["passed"] is None
    assert "fail_fast" in later["message"]


def test_options_reach_the_constructor_and_the_policy(invarlock, module, config) -> None:
    module(
        "optional",
        "from invarlock.core.api import Guard\nclass Optional(Guard):\n    name = 'optional'\n"
        "    def __init__(self, limit=1.0): self.limit = limit\n"
        "    def prepare(self, model, adapter, calib, policy): return {'ready': True, 'policy': dict(policy)}\n"
        "    def validate(self, model, adapter, context):\n"
        "        return {'passed': True, 'metrics': {'limit': self.limit, 'policy': dict(context['policy'])}}\n",
    )
    path = config(guards={"order": ["optional"], "optional": {"limit": 7}})
    invarlock("run", "-c", path, "-p", "optional", "--out", "out")
    guard = read_report(Path("out"))["guards"][0]
    assert guard["metrics"] == {"limit": 7, "policy": {"limit": 7}}
    assert guard["prepare"]["policy"] == {"limit": 7}


def test_a_class_with_required_options_runs_when_they_are_given(invarlock, module, config) -> None:
    source = (
        "from invarlock.core.api import Guard\nclass Needy(Guard):\n    name = 'needy'\n"
        "    def __init__(self, limit): pass\n    def validate(self, model, adapter, context): return {'passed': True}\n"
    )
    module("needy_module", source)
    done = invarlock("run", "-c", config(guards={"order": ["needy"]}), "-p", "needy_module", "--out", "out")
    assert done.code == 2
    assert "limit" in done.err


@pytest.mark.parametrize(
    ("guards", "said"),
    [
        ({"order": ["invarients"]}, ["guards.order", "'invariants'"]),
        ({"order": ["hello_guard"], "hello_guard": {"treshold": 1}}, ["guards.hello_guard.treshold", "'threshold'"]),
        ({"order": ["invariants"], "helo_guard": {}}, ["guards.helo_guard", "'hello_guard'"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_guards_is_said_before_anything_is_loaded(invarlock, config, guards, said) -> None:
    done = invarlock("run", "-c", config(model={"id": "nowhere"}, guards=guards), "--out", "out")
    assert done.code == 2
    assert all(part in done.err for part in said), done.err
    assert not Path("out").exists()


def test_a_guard_with_options_that_is_not_in_the_order_is_said(invarlock, config) -> None:
    done = invarlock(
        "run", "-c", config(guards={"order": ["invariants"], "hello_guard": {"threshold": 1}}), "--out", "o"
    )
    assert done.code == 0
    assert "hello_guard" in done.err
    assert "guards.order" in done.err


def test_hello_guard_passes_while_the_score_is_within_its_threshold(invarlock, config) -> None:
    from plugins_builtin.guards.hello_guard import HelloGuard

    assert HelloGuard(threshold=1.0).validate(None, None, {"hello_score": 1.0})["passed"] is True
    assert HelloGuard(threshold=1.0).validate(None, None, {"hello_score": 1.1})["passed"] is False


def test_a_wrapper_runs_once_around_each_guard(invarlock, module, config) -> None:
    module(
        "timer",
        "from pathlib import Path\nfrom invarlock import hookimpl\n"
        "@hookimpl(wrapper=True)\ndef invarlock_validate(guard):\n"
        "    result = yield\n    with Path('calls').open('a') as f: f.write(guard + '\\n')\n    return result\n",
    )
    path = config(guards={"order": ["invariants", "hello_guard"]})
    done = invarlock("run", "-c", path, "-p", "timer", "--out", "out")
    assert done.code == 0, done.err
    assert Path("calls").read_text() == "invariants\nhello_guard\n"


def test_a_guard_finds_what_its_taps_saw_before_and_after(invarlock, module, config) -> None:
    module(
        "tapper",
        "from invarlock import hookimpl\nclass Tap:\n    calls = 0\n    largest = 0.0\n"
        "    def __call__(self, module, args, kwargs, output):\n"
        "        self.calls += 1\n        self.largest = max(self.largest, output.abs().max().item())\n"
        "    def result(self): return {'calls': self.calls, 'largest': self.largest}\n"
        "@hookimpl\ndef invarlock_observe(model): return {'model.layers.0.mlp': Tap()}\n"
        "@hookimpl\ndef invarlock_validate(context): return {'passed': True, 'metrics': context['observations']}\n",
    )
    path = config(guards={"order": ["tapper"]}, edit={"plan": {"bitwidth": 4}})
    invarlock("run", "-c", path, "-p", "tapper", "--out", "out")
    seen = read_report(Path("out"))["guards"][0]["metrics"]
    before, after = seen["baseline"]["model.layers.0.mlp"], seen["edited"]["model.layers.0.mlp"]
    assert before["calls"] == after["calls"] > 0
    assert before["largest"] != after["largest"]


def test_each_side_is_run_over_the_windows_exactly_once(invarlock, module, config) -> None:
    """For the metric, the predictions and all built-in guards together."""
    module(
        "counter",
        "import torch\nfrom invarlock import hookimpl\nwindows = []\n"
        "@hookimpl(wrapper=True)\ndef invarlock_load_model():\n"
        "    model = yield\n"
        # Gradients, which shares are predicted by, are of the beginning of one window.
        "    note = lambda module, args, kwargs: torch.is_grad_enabled() or windows.append(kwargs['input_ids'])\n"
        "    model.register_forward_pre_hook(note, with_kwargs=True)\n    return model\n"
        "@hookimpl\ndef invarlock_run_finished(report):\n"
        "    report['extra']['windows'] = [row for batch in windows for row in batch.tolist()]\n",
    )
    done = invarlock("run", "-c", config(plugins=["counter"], guards={}), "--out", "out")
    assert done.code == 0, done.err
    report = read_report(Path("out"))
    assert [guard["name"] for guard in report["guards"]] == list(GuardsConfig().order)
    assert not any("not measured" in guard["message"] for guard in report["guards"])
    dataset, seen = report["config"]["dataset"], report["extra"]["windows"]
    half = dataset["preview_n"] + dataset["final_n"]
    assert len(seen) == 2 * half
    assert seen[:half] == seen[half:]
    assert len(set(map(tuple, seen[:half]))) == half


def test_the_edited_model_is_run_over_the_preview_windows_that_taps_look_at(invarlock, module, config) -> None:
    for name, taps in {"few": "{'lm_head': Tap(65)}", "every": "{'model.norm': Tap(None), 'lm_head': Tap(1)}"}.items():
        module(
            name,
            "from invarlock import hookimpl\n"
            "class Tap:\n"
            "    rows = 0\n"
            "    def __init__(self, positions): self.positions = positions\n"
            "    def __call__(self, module, args, kwargs, output): self.rows += len(output)\n"
            "    def result(self): return self.rows\n"
            f"@hookimpl\ndef invarlock_observe(): return {taps}\n"
            "@hookimpl\ndef invarlock_validate(context): return {'passed': True, 'metrics': context['observations']}\n",
        )
    dataset = {"provider": "demo", "seq_len": 64, "preview_n": 5, "final_n": 2}
    path = config(dataset=dataset, plugins=["few", "every"], guards={"order": ["few", "every"]})
    assert invarlock("run", "-c", path, "--out", "both").code == 0
    few, every = (guard["metrics"] for guard in read_report(Path("both"))["guards"])
    assert few["baseline"] == few["edited"] == {"lm_head": 2}
    assert every["baseline"] == every["edited"] == {"model.norm": 5, "lm_head": 5}
    module(
        "counter",
        "from invarlock import hookimpl\nwindows = []\n"
        "@hookimpl(wrapper=True)\ndef invarlock_load_model():\n"
        "    model = yield\n"
        "    model.register_forward_hook(lambda module, args, output: windows.append(len(output.logits)))\n"
        "    return model\n"
        "@hookimpl\ndef invarlock_run_finished(report): report['extra']['windows'] = sum(windows)\n",
    )
    done = invarlock("run", "-c", path, "-p", "counter", "--set", "guards.order=[few]", "--out", "few")
    assert done.code == 0, done.err
    # Each side runs one window more before taps of strangers are put on it; and one is run for gradients.
    assert read_report(Path("few"))["extra"]["windows"] == (1 + 5 + 2) + 1 + (1 + 2 + 2)


@pytest.mark.parametrize(
    "observe",
    [
        "raise ValueError('tapped wrongly')",
        "return {'model.layers.9': print}",
        "return {'model.norm': lambda *a: 1 / 0}",
        "return {'model.norm': type('Tap', (), {'positions': 0, '__call__': print, 'result': print})()}",
    ],
)
def test_a_tap_that_fails_is_the_guards_own_error(invarlock, module, config, observe: str) -> None:
    module("bad_tap", f"from invarlock import hookimpl\n@hookimpl\ndef invarlock_observe(model):\n    {observe}\n@hookimpl\ndef invarlock_validate(context): {PASS}\n")  # fmt: skip
    done = invarlock("run", "-c", config(guards={"order": ["bad_tap", "invariants"]}), "-p", "bad_tap", "--out", "out")
    assert done.code == 3
    guards = read_report(Path("out"))["guards"]
    assert guards[0]["action"] == "abort"
    assert guards[0]["error"]


def test_a_plugin_adds_to_the_report_before_it_is_written(invarlock, module, config) -> None:
    module(
        "noter",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_run_finished(report):\n    report['extra']['ticket'] = 7\n",
    )
    invarlock("run", "-c", config(plugins=["noter"]), "--out", "out")
    assert read_report(Path("out"))["extra"] == {"ticket": 7}


# -- adapters ----------------------------------------------------------------------------------------------------------

ONLY_LOADS = (
    "from invarlock.core.api import ModelAdapter\nclass Mine(ModelAdapter):\n    name = 'mine'\n"
    "    def load_model(self, model_id):\n"
    "        from transformers import AutoModelForCausalLM\n"
    "        return AutoModelForCausalLM.from_pretrained(model_id, dtype='float32').eval()\n"
)


def test_an_adapter_that_has_only_load_model_is_enough(invarlock, module, config) -> None:
    module("mine_module", ONLY_LOADS)
    path = config(
        model={"id": str(DEMO / "checkpoint"), "adapter": "mine"}, edit={"plan": {"bitwidth": 2, "scope": "all"}}
    )
    done = invarlock("run", "-c", path, "-p", "mine_module", "--out", "out")
    assert done.code == 1, done.err
    report = read_report(Path("out"))
    assert report["model"]["adapter"] == "mine"
    assert report["model"]["restored"] is True
    assert report["model"]["description"]["n_layer"] == 4


def test_an_option_that_the_adapter_does_not_take_is_said(invarlock, module, config) -> None:
    module("mine_module", ONLY_LOADS)
    path = config(model={"id": str(DEMO / "checkpoint"), "adapter": "mine", "dtype": "bfloat16"})
    done = invarlock("run", "-c", path, "-p", "mine_module", "--out", "out")
    assert done.code == 2
    assert "model.dtype" in done.err


def test_auto_asks_the_next_adapter_when_one_breaks_and_says_so(invarlock, module, config) -> None:
    broken = ONLY_LOADS.replace("from transformers import AutoModelForCausalLM", "1 / 0")
    module("mine_module", broken.replace("(self, model_id)", "(self, model_id, **kwargs)"))
    path = config(model={"id": str(DEMO / "checkpoint"), "dtype": "float32"})
    done = invarlock("run", "-c", path, "-p", "mine_module", "--out", "out")
    assert done.code == 0
    assert "adapter mine" in done.err
    assert "ZeroDivisionError" in done.err
    assert read_report(Path("out"))["model"]["adapter"] == "hf_causal"


def test_an_adapter_as_functions_gets_the_defaults_for_what_it_leaves_out(invarlock, module, config) -> None:
    module(
        "function_adapter",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_load_model(model_id):\n"
        "    from transformers import AutoModelForCausalLM\n"
        "    return AutoModelForCausalLM.from_pretrained(model_id, dtype='float32').eval()\n",
    )
    path = config(model={"id": str(DEMO / "checkpoint"), "adapter": "function_adapter"})
    assert invarlock("run", "-c", path, "-p", "function_adapter", "--out", "out").code == 0


def test_an_adapter_that_does_not_restore_is_caught(invarlock, module, config) -> None:
    module("mine_module", ONLY_LOADS + "    def restore(self, model, snapshot): pass\n")
    path = config(
        model={"id": str(DEMO / "checkpoint"), "adapter": "mine"}, edit={"plan": {"bitwidth": 2, "scope": "all"}}
    )
    done = invarlock("run", "-c", path, "-p", "mine_module", "--out", "out")
    assert done.code == 3
    assert "adapter mine: restore did not bring the baseline back" in done.err


# -- broken input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    for path in (DEMO / "checkpoint").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)


def lose_a_weight(folder: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickle_it(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def spoil_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize("adapter", ["auto", "hf_causal"])
@pytest.mark.parametrize(
    "spoil", [truncate, garble, lose_a_weight, pickle_it, spoil_config, remove_tokenizer, remove_all]
)
def test_a_broken_checkpoint_is_one_line_and_nothing_written(invarlock, config, checkpoint, spoil, adapter) -> None:
    spoil(checkpoint)
    done = invarlock("run", "-c", config(model={"id": str(checkpoint), "adapter": adapter}), "--out", "out")
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1, done.err
    assert str(checkpoint) in done.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"model": {"id": "not/there"}}, "--allow-network"), ({"model": {"id": "x", "adapter": "hf_casual"}}, "'hf_causal'"),
        ({"model": {"id": str(DEMO / "checkpoint"), "adapter": "hf_gguf"}}, "adapter hf_gguf"),
        ({"model": {"id": "not/there.gguf"}}, "not/there.gguf does not exist"),
        ({"dataset": {"provider": "demo", "seq_len": 256, "final_n": 5000}}, "windows"),
        ({"dataset": {"provider": "demo", "seq_len": 512}}, "256"),
        ({"edit": {"plan": {"include": ["*.mlp.up_prj"]}}}, "edit.plan.include"),
        ({"edit": {"plan": {"scope": "attn", "exclude": ["*"]}}}, "edit.plan.scope"),
        ({"eval": {"metric": {"kind": "masked_perplexity"}}}, "perplexity"),
        ({"model": {"id": str(DEMO / "checkpoint"), "device": "cuda:99"}}, "model.device"),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_run_is_one_line(invarlock, config, section, said: str) -> None:
    done = invarlock("run", "-c", config(**section), "--out", "out")
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1, done.err
    assert not Path("out").exists()


# -- output ------------------------------------------------------------------------------------------------------------


def test_a_run_never_writes_over_another_ones_output_without_force(invarlock, config) -> None:
    assert invarlock("run", "-c", config(), "--out", "out").code == 0
    first = Path("out/report.json").read_bytes()
    done = invarlock("run", "-c", config(), "--out", "out")
    assert done.code == 2
    assert "--force" in done.err
    assert Path("out/report.json").read_bytes() == first
    assert invarlock("run", "-c", config(), "--out", "out", "--force").code == 0
    assert Path("out/report.json").read_bytes() != first


def test_force_removes_the_model_of_an_accepted_run_when_the_next_is_rejected(invarlock, config) -> None:
    invarlock("run", "-c", config(output={"save_model": True}), "--out", "out")
    assert Path("out/model").exists()
    invarlock("run", "-c", config(edit={"plan": {"bitwidth": 2, "scope": "all"}}), "--out", "out", "--force")
    assert not Path("out/model").exists()


def test_an_output_inside_the_input_is_refused(invarlock, config, checkpoint) -> None:
    done = invarlock("run", "-c", config(model={"id": str(checkpoint)}), "--out", checkpoint / "out")
    assert done.code == 2
    assert "inside the input" in done.err


@pytest.mark.parametrize("out", ["work", "link", "elsewhere/../work"])
def test_an_input_that_lies_where_the_output_goes_is_never_removed(invarlock, config, checkpoint, out) -> None:
    Path("work").mkdir()
    Path("elsewhere").mkdir()
    shutil.copytree(checkpoint, "work/model")
    Path("link").symlink_to("work")
    path = config(model={"id": "work/model", "device": "cpu"}, edit={"plan": {"bitwidth": 2, "scope": "all"}})
    for arguments in (("run", "-c", path), ("compare", "--baseline", checkpoint, "--subject", "work/model")):
        done = invarlock(*arguments, "--out", out, "--force")
        assert done.code == 2
        assert "the input work/model" in done.err
    assert {path.name for path in Path("work/model").iterdir()} == {path.name for path in checkpoint.iterdir()}


def test_without_a_folder_each_run_gets_a_new_one(invarlock, config) -> None:
    for _ in range(2):
        assert invarlock("run", "-c", config()).code == 0
    assert len(list(Path("runs").glob("config-*/report.json"))) == 2


def test_json_is_the_report_whole_and_alone(invarlock, config) -> None:
    done = invarlock("run", "-c", config(), "--out", "out", "--json")
    assert json.loads(done.out) == read_report(Path("out"))


def test_quiet_prints_the_verdict_line_alone(invarlock, config) -> None:
    assert invarlock("run", "-c", config(), "--out", "out", "-q").out == "ACCEPTED (continue): no guard objected\n"


def test_the_same_run_gives_the_same_report_but_for_times(invarlock, config) -> None:
    reports = []
    for name in ("a", "b"):
        invarlock("run", "-c", config(), "--out", name)
        report = read_report(Path(name))
        for timed in (*report["guards"], *report["attempts"]):
            timed.pop("seconds")
        for key in ("created", "timings", "command"):
            report.pop(key)
        report["config"]["output"].pop("dir")
        report.pop("config_sha256")
        reports.append(report)
    assert reports[0] == reports[1]


# -- whatever happens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "MemoryError"])
def test_the_model_in_memory_is_restored_whatever_is_raised(module, config, error: str, monkeypatch) -> None:
    """The pipeline as a library: the model that an adapter handed out equals the baseline afterwards."""
    module("holder", ONLY_LOADS.replace("return ", "global MODEL; MODEL = ").replace("name = 'mine'", "name = 'holder'") + "        return MODEL\n")  # fmt: skip
    module("raiser", guard_module(f"raise {error}" if error != "MemoryError" else PASS))
    settings = load(
        str(config(model={"id": str(DEMO / "checkpoint"), "adapter": "holder"}, guards={"order": ["raiser"]}))
    )
    plugins = PluginManager.load(Selection.of(["holder", "raiser"], autoload=True))
    if error == "MemoryError":
        monkeypatch.setattr(PluginManager, "run_finished", lambda self, report: (_ for _ in ()).throw(MemoryError))
    with pytest.raises({"KeyboardInterrupt": KeyboardInterrupt, "MemoryError": MemoryError}[error]):
        run(settings, plugins)
    import holder
    from transformers import AutoModelForCausalLM

    untouched = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32")
    assert Fingerprint.of(holder.MODEL) == Fingerprint.of(untouched)
    assert holder.MODEL.lm_head.weight is holder.MODEL.model.embed_tokens.weight


def test_interrupting_the_process_ends_with_130_and_leaves_nothing(forking, module) -> None:
    module("stopper", guard_module("import os, signal; os.kill(os.getpid(), signal.SIGINT)\n    " + PASS))
    run = forking.start("run", "--demo", "-p", "stopper", "--set", "guards.order=[stopper]", "--out", "out")
    assert run.wait() == 130
    assert "Traceback" not in run.said()[1]
    assert not Path("out").exists()


@pytest.mark.parametrize(("options", "bits", "code"), [(("--json",), 8, 0), *slow(((), 8, 0), (("-q",), 2, 1))])
def test_a_reader_that_is_gone_changes_no_verdict(
    forking, config, options: tuple[str, ...], bits: int, code: int
) -> None:
    path = config(edit={"plan": {"bitwidth": bits, "scope": "all"}})
    process = forking.start("run", "-c", path, "--out", f"out{bits}", *options, program=NO_READER)
    assert (process.wait(), process.said()[1]) == (code, "")


def test_what_a_plugin_prints_is_not_in_the_json(invarlock, module, config) -> None:
    module("noisy", "from invarlock import hookimpl\n@hookimpl\ndef invarlock_attempt_finished(): print('noise')\n")
    done = invarlock("run", "-c", config(), "--out", "out", "-p", "noisy", "--json")
    assert json.loads(done.out)["verdict"]["accepted"] is True
    assert done.err == "noise\n"


def test_a_page_that_cannot_be_drawn_loses_no_run(invarlock, config, monkeypatch) -> None:
    from invarlock.pipeline import writing

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(writing, "render_html", fail)
    done = invarlock("run", "-c", config(output={"save_model": True}), "--out", "out")
    assert done.code == 0
    assert "report.html could not be written: RuntimeError: no ink; report.json is whole" in done.err
    assert sorted(path.name for path in Path("out").iterdir()) == ["model", "report.json"]


def test_text_that_is_no_unicode_is_written_all_the_same(invarlock, module, config) -> None:
    module(
        "broken",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_validate():\n"
        "    return {'passed': True, 'action': 'warn', 'message': 'bad \\ud800'}\n",
    )
    done = invarlock("run", "-c", config(guards={"order": ["broken"]}), "--out", "out", "-p", "broken")
    assert done.code == 0, done.err
    assert read_report(Path("out"))["guards"][0]["message"] == "bad ?"
