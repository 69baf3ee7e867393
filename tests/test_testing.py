"""The kit for authors: what it finds in bad guards, and that it does no harm where nobody uses it."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import slow

from invarlock import hookimpl
from invarlock.core.api import Guard
from invarlock.core.errors import UsageError
from invarlock.core.results import Action
from invarlock.models.fingerprint import Fingerprint
from invarlock.plugins.catalog import Catalog, Selection
from invarlock.plugins.plugin import Kind
from invarlock.testing import ARCHITECTURES, check_guard, checking, damage, edits, run_guard, tiny_model
from invarlock.testing.weights import WEIGHT_DAMAGES

SAMPLING = ("rmt", "variance")
"""Guards that look at activations alone, which `reconstruction` does besides."""
BUILT_IN = {plugin.name: plugin.factory for plugin in Catalog.discover(Selection(autoload=False)).of_kind(Kind.GUARD)}


@pytest.mark.parametrize("name", [*(name for name in BUILT_IN if name not in SAMPLING), *slow(*SAMPLING)])
def test_every_guard_that_ships_keeps_what_a_guard_owes(name: str) -> None:
    check_guard(BUILT_IN[name])


# -- check_guard -------------------------------------------------------------------------------------------------------


class Passes(Guard):
    """Keeps every promise."""

    name = "passes"

    def validate(self, model, adapter, context):
        return {"passed": True, "action": "continue"}


class Objects(Guard):
    def validate(self, model, adapter, context):
        return {"passed": False, "action": "rollback", "message": "no good"}


class Warns(Guard):
    def validate(self, model, adapter, context):
        return {"passed": True, "action": "warn", "message": "hm"}


class Raises(Guard):
    def validate(self, model, adapter, context):
        raise RuntimeError("at once")


class ChangesTheModel(Guard):
    def prepare(self, model, adapter, calib, policy):
        with torch.no_grad():
            next(model.parameters()).view(-1)[0].add_(1)
        return {"ready": True}

    def validate(self, model, adapter, context):
        return {"passed": True}


class ThrowsDice(Guard):
    def validate(self, model, adapter, context):
        return {"passed": True, "metrics": {"dice": random.random()}}


class ReturnsATensor(Guard):
    def validate(self, model, adapter, context):
        return {"passed": True, "metrics": {"largest": next(model.parameters()).detach().max()}}


class KnowsNoBfloat16(Guard):
    def validate(self, model, adapter, context):
        return {"passed": True, "metrics": {"any": bool(next(model.parameters()).detach().numpy().any())}}


class ExpectsMatrices(Guard):
    """Falls over the three axes of experts."""

    def validate(self, model, adapter, context):
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.view(parameter.shape[0], parameter.shape[1])
        return {"passed": True}


class CountsParametersTwice(Guard):
    """Takes tied weights for untied ones."""

    def validate(self, model, adapter, context):
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        same = len(names) == len(list(model.parameters()))
        return {"passed": same, "action": "continue" if same else "warn"}


class ExpectsNumbersBefore(Guard):
    def prepare(self, model, adapter, calib, policy):
        return {"ready": True, "largest": int(max(parameter.abs().max() for parameter in model.parameters()))}

    def validate(self, model, adapter, context):
        return {"passed": True}


class ExpectsNumbersAfter(Guard):
    def validate(self, model, adapter, context):
        return {"passed": True, "metrics": {"sum": int(sum(float(p.detach().sum()) for p in model.parameters()))}}


@pytest.mark.parametrize(
    ("guard", "said"),
    [
        (Objects, "llama: it does not pass the unedited model: rollback: no good"),
        (Warns, "opt: it does not pass the unedited model in bfloat16: warn: hm"),
        (Raises, "t5: it fails on the unedited model: RuntimeError: at once"),
        (ChangesTheModel, "gpt2: it fails on the unedited model: the guard changed the model"),
        (ThrowsDice, "bert: the same run gives another result"),
        (
            ReturnsATensor,
            "llama: what validate returns is not plain: Object of type Tensor is not JSON serializable",
        ),
        (KnowsNoBfloat16, "llama: it fails on the unedited model in bfloat16"),
        (ExpectsMatrices, "mixtral: it fails"),
        (CountsParametersTwice, "llama_tied: it does not pass"),
        (ExpectsNumbersBefore, "llama: it fails with infinity before the edit"),
        (ExpectsNumbersAfter, "llama: it fails with NaN after the edit"),
    ],
)
def test_a_broken_promise_is_named(guard: type[Guard], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The architecture where it is to be seen is enough.
    monkeypatch.setattr(checking, "ARCHITECTURES", [said.split(":")[0]])
    with pytest.raises(AssertionError) as broken:
        check_guard(guard)
    assert str(broken.value).startswith(f"{guard.__name__} does not keep what a guard owes:\n- ")
    assert said in str(broken.value)


def test_options_are_given_to_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "ARCHITECTURES", ["llama"])

    class Limited(Passes):
        def __init__(self, limit: float) -> None:
            self.limit = limit

        def validate(self, model, adapter, context):
            assert (self.limit, context["policy"]) == (2.0, {"limit": 2.0})
            return super().validate(model, adapter, context)

    check_guard(Limited, limit=2.0)


# -- run_guard ---------------------------------------------------------------------------------------------------------


class CountsChanges(Guard):
    """Tells what a guard gets to know of an edit."""

    name = "counts_changes"

    def observe(self, model, adapter, policy):
        return {"lm_head": _Calls()}

    def prepare(self, model, adapter, calib, policy):
        return {"ready": True, "batches": len(list(calib))}

    def validate(self, model, adapter, context):
        changed = [weight["name"] for weight in context["edit"]["modules"] if weight["change"] != "unchanged"]
        metrics = {"edit": context["edit"]["name"], "changed": changed, "seen": context["observations"]["edited"]}
        metrics["ratio"] = context["edited"]["ratio"]
        return {"passed": not changed, "action": "warn" if changed else "continue", "metrics": metrics}


class _Calls:
    def __init__(self):
        self.calls = 0

    def __call__(self, module, args, kwargs, output):
        self.calls += 1

    def result(self):
        return self.calls


def zero_head(model) -> None:
    model.lm_head.weight.zero_()


@pytest.mark.parametrize(
    ("edit", "name", "changed"),
    [
        (None, "compare", []),
        (zero_head, "compare", ["lm_head"]),
        ("zeroed", "compare", ["model.layers.1.mlp.down_proj"]),
        ("attention of a layer zeroed", "compare", ["model.layers.1.self_attn.o_proj"]),
    ],
)
def test_a_guard_is_told_what_an_edit_changed_and_the_model_is_as_before(edit, name: str, changed: list[str]) -> None:
    model = tiny_model()
    before = Fingerprint.of(model)
    result = run_guard(CountsChanges, model, edit)
    assert Fingerprint.of(model) == before
    assert result.error is None
    assert (result.name, result.action) == ("counts_changes", Action.WARN if changed else Action.CONTINUE)
    assert (result.metrics["edit"], result.metrics["changed"]) == (name, changed)
    assert result.metrics["seen"] == {"lm_head": 1}
    assert (result.metrics["ratio"] == 1.0) is (not changed)


def test_a_number_rounds_to_so_many_bits() -> None:
    result = run_guard(CountsChanges(), tiny_model(), 2)
    assert result.metrics["edit"] == "quant_rtn"
    assert len(result.metrics["changed"]) == 14


def test_a_module_of_functions_is_a_guard() -> None:
    @hookimpl
    def invarlock_validate(model, context):
        broken = not all(parameter.isfinite().all() for parameter in model.parameters())
        return {"passed": not broken, "action": "abort" if broken else "continue", "metrics": dict(context["policy"])}

    module = types.ModuleType("finite")
    module.invarlock_validate = invarlock_validate
    assert run_guard(module, tiny_model("gpt2"), limit=3).metrics == {"limit": 3}
    result = run_guard(module, tiny_model("gpt2"), "with one NaN")
    assert (result.name, result.action, result.error) == ("finite", Action.ABORT, None)


def test_a_guard_that_is_not_ready_or_raises_is_told_as_in_a_run() -> None:
    class NotReady(Passes):
        def prepare(self, model, adapter, calib, policy):
            return {"ready": False, "message": "nothing to look at"}

    assert run_guard(NotReady, tiny_model()).message == "nothing to look at"
    result = run_guard(Raises, tiny_model())
    assert result.action is Action.ABORT
    assert "RuntimeError: at once" in result.error


def test_a_guard_whose_hooks_are_wrong_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="implements no hook"):
        run_guard(types.ModuleType("empty"), tiny_model())


# -- models and edits --------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_said_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="did you mean 'mixtral'"):
        tiny_model("mixtrel")


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [*((name, torch.float32) for name in ARCHITECTURES), ("llama", torch.bfloat16), ("mixtral", torch.float16)],
)
def test_every_edit_changes_what_it_names_in_every_architecture(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture).to(dtype)
    fitting = [edit for edit in edits(model) if not (edit.untied and model.config.tie_word_embeddings)]
    fitting += [damage(model, name) for name in WEIGHT_DAMAGES]
    assert len({edit.name for edit in fitting}) == len(fitting)
    before = Fingerprint.of(model)
    for edit in fitting:
        edited = copy.deepcopy(model)
        edit(edited)
        changed = Fingerprint.of(edited).changed_since(before)
        if edit.module:
            assert {name.removesuffix(".weight") for name in changed} >= {edit.module}, edit.name
        elif not edit.name.startswith(("identity", "exact untie", "norms folded", "permuted heads", "round trip")):
            assert changed, edit.name


def test_damage_names_the_module_and_is_the_same_each_time() -> None:
    model, again = tiny_model("bert"), tiny_model("bert")
    edit = damage(model, "shuffled", "bert.encoder.layer.0.attention.self.value")
    assert edit.module == "bert.encoder.layer.0.attention.self.value"
    edit(model)
    edit(again)
    assert Fingerprint.of(model) == Fingerprint.of(again)
    assert Fingerprint.of(model).changed_since(Fingerprint.of(tiny_model("bert"))) == [f"{edit.module}.weight"]


@pytest.mark.parametrize(
    ("name", "module", "said"),
    [
        ("zerod", None, "did you mean 'zeroed'"),
        ("zeroed", "model.layers.0.mlp.up_prj", "did you mean 'model.layers.0.mlp.up_proj'"),
        ("pruned 50%", "lm_head", "not of one module"),
        ("layers swapped", None, None),
    ],
)
def test_damage_that_is_not_there_is_a_usage_error(name: str, module: str | None, said: str | None) -> None:
    if said is None:
        assert damage(tiny_model(), name).name == name
        with pytest.raises(UsageError, match="GPT2LMHeadModel"):
            damage(tiny_model("gpt2"), name)
    else:
        with pytest.raises(UsageError, match=said):
            damage(tiny_model(), name, module)


# -- invarlocker and the pytest plugin ---------------------------------------------------------------------------------

GUARD = (
    "from invarlock import hookimpl\n"
    "@hookimpl\ndef invarlock_validate(model): return {'passed': False, 'action': 'rollback', 'message': 'never'}\n"
)


def test_the_command_line_runs_local_plugins_and_reads_the_report(invarlocker, config) -> None:
    invarlocker.module("never", GUARD)
    path = config(guards={"order": ["never"]}, output={"save_model": True})
    done = invarlocker.run("run", "-c", path, "-p", "never", "--out", "here")
    assert (done.code, done.report["verdict"]["decided_by"]) == (1, "guard never")
    assert "never" in done.out
    assert json.loads(Path("here/report.json").read_text()) == done.report
    assert invarlocker.run("plugins").report is None
    accepted = invarlocker.run("run", "-c", config(output={"save_model": True}), "--out", "there")
    assert accepted.report["artifacts"] == json.loads(Path("there/report.json").read_text())["artifacts"]


def test_a_process_of_its_own_sees_the_same_plugins(invarlocker) -> None:
    invarlocker.install("never-plugin", "[invarlock.guards]\nnever = never_guard\n", never_guard=GUARD)
    here, there = (run("plugins", "guards", "--json") for run in (invarlocker.run, invarlocker.run_subprocess))
    assert json.loads(here.out) == json.loads(there.out)
    assert "never" in {item["name"] for item in json.loads(here.out)["items"]}
    assert invarlocker.run_subprocess("plugins", "--explain", "nobody").code == 2


def test_loading_the_pytest_plugin_imports_nothing_heavy() -> None:
    code = "import sys, invarlock.testing.plugin; print([n for n in ('torch', 'transformers', 'numpy', 'yaml') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_project_that_does_not_use_the_kit_notices_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_other(capsys):\n    assert 'torch' not in sys.modules\n"
    )
    arguments = ["-W", "error", "--strict-markers", "--strict-config", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
