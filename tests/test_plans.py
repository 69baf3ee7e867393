"""Plans as lists of rules: read, carried out, saved with mixed schemes, and repaired after a rollback."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
import yaml
from conftest import DEMO, read_report
from transformers import AutoModelForCausalLM

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.config.loading import json_schema, load
from invarlock.core.errors import UsageError
from invarlock.core.results import SuspectedModule
from invarlock.pipeline import run
from invarlock.pipeline.planning.repairing import Part, Repair, as_rules
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.quantization import Plan, find_weights, quantize_model
from invarlock.quantization.rules import Rule, Rules
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import PlannedWeight, planned_weights
from invarlock.testing import architectures

# Of compressed-tensors, on import, and of the loader that transformers has for GGUF.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

MIXED = [
    {"match": "*.0.mlp.*", "keep": True},
    {"match": "*.down_proj", "bitwidth": 6, "group_size": 16},
    {"match": ["*.mlp.*", "re:.*self_attn.*"], "bitwidth": 4, "group_size": 32},
]
BLAMED = {"plan": {"bitwidth": 2, "group_size": 32, "scope": "all"}}


def mixed(*rules: dict[str, Any]) -> Rules:
    return Rules(tuple(Rule(**rule) for rule in rules))


def bits(model: torch.nn.Module, *rules: dict[str, Any]) -> dict[str, int]:
    return {each.target.name: each.scheme.bitwidth for each in planned_weights(model, mixed(*rules))}


# -- reading ---------------------------------------------------------------------------------------------------------


def test_a_list_of_rules_is_a_plan_and_comes_back_from_the_report(config) -> None:
    read = load(str(config(edit={"plan": MIXED})))
    assert [rule.match for rule in read.edit.plan.rules][1:] == [("*.down_proj",), ("*.mlp.*", "re:.*self_attn.*")]
    Path("again.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(read.as_dict()))))
    assert load("again.yaml") == read
    assert load(str(config()), [f"edit.plan={json.dumps(MIXED)}"]).edit.plan == read.edit.plan


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"match": "*", "bits": 6}], "edit.plan[0].bits: unknown key; did you mean 'bitwidth'?"),
        ([{"match": "*"}, {"match": "*", "bitwidth": 9}], "edit.plan[1].bitwidth: expected integer 2..8, found 9"),
        ([{"match": "*", "group_size": 8, "per_channel": False}], "edit.plan[0].group_size: is 8"),
        ([{"match": "*", "bitwidth": 8, "keep": True}], "edit.plan[0].bitwidth: is 8, but edit.plan[0].keep leaves"),
        ([{"match": "*", "format": "fp9"}], "edit.plan[0].format: expected int | fp8"),
        ([{"match": "*", "scope": "ffn"}], "edit.plan[0].scope: unknown key"),
        ([{"match": "re:("}], "edit.plan[0].match: holds 're:('"),
        ([{"match": []}], "edit.plan[0].match: holds no pattern"),
        ([{"match": 3}], "edit.plan[0].match: expected string or list of strings, found 3"),
        ([{"bitwidth": 3}], "edit.plan[0].match: is required"),
        (["*"], "edit.plan[0]: expected a mapping with the key match, found '*'"),
        ([], "edit.plan: the list of rules is empty"),
    ],
)
def test_a_mistake_names_the_rule_and_its_key(config, rules: list[Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(str(config(edit={"plan": rules})))
    assert said in str(caught.value)


def test_editors_know_both_forms() -> None:
    for plan in (MIXED, {"bitwidth": 4}):
        jsonschema.validate({"model": {"id": "here"}, "edit": {"plan": plan}}, json_schema())
    for plan in ([], [{"bitwidth": 4}], [{"match": "*", "scope": "all"}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({"model": {"id": "here"}, "edit": {"plan": plan}}, json_schema())


# -- selecting ---------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides_and_the_others_are_left_alone() -> None:
    model = architectures.llama()
    found = bits(model, {"match": ("*.0.*",), "keep": True}, {"match": ("*.down_proj", "*.q_proj"), "bitwidth": 3})
    assert found == {"model.layers.1.self_attn.q_proj": 3, "model.layers.1.mlp.down_proj": 3}


def test_a_wide_pattern_takes_no_embedding_along_and_one_for_it_does() -> None:
    model = architectures.llama(tie_word_embeddings=False)
    everything = {target.name for target in find_weights(model)}
    assert everything - set(bits(model, {"match": ("*",)})) == {"model.embed_tokens", "lm_head"}
    assert everything - set(bits(model, {"match": ("*", "lm_head")})) == {"model.embed_tokens"}


def test_each_weight_is_rounded_as_by_a_plan_of_its_own_scheme() -> None:
    model, whole = architectures.llama(), architectures.llama()
    whole.load_state_dict(model.state_dict())
    effects = quantize_model(model, mixed({"match": ("*.up_proj",), "bitwidth": 3}, {"match": ("*",), "bitwidth": 5}))
    quantize_model(whole, Plan(bitwidth=5, scope="all", exclude=("*.up_proj",)))
    quantize_model(whole, Plan(bitwidth=3, include=("*.up_proj",)))
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), whole.parameters(), strict=True))
    assert {effect.bits for effect in effects if "up_proj" in effect.name} == {3}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ([{"match": "*"}, {"match": "*.up_prj"}], "edit.plan[1].match holds '*.up_prj', which matches no weight"),
        ([{"match": "*.mlp.*"}, {"match": "*.up_proj"}], "edit.plan[1].match decides nothing: edit.plan[0].match"),
        ([{"match": "*", "keep": True}], "edit.plan[0].keep is true, as it is of all rules"),
    ],
)
@pytest.mark.parametrize("command", ["run", "run --stream", "doctor"])
def test_a_rule_that_does_nothing_is_an_error_before_the_run(invarlock, config, rules, said: str, command) -> None:
    name, *options = command.split()
    done = invarlock(name, "-c", config(edit={"plan": rules}), *options, *(["--out", "out"] if name == "run" else []))
    assert done.code == (2 if name == "run" else 1)
    assert said in (done.err if name == "run" else " ".join(done.out.split()))
    assert not Path("out").exists()


# -- running and saving ------------------------------------------------------------------------------------------------


def test_a_mixed_run_is_reported_verified_and_streamed_alike(invarlock, config) -> None:
    path = config(edit={"plan": MIXED}, output={"save_model": True, "format": "dequantized"})
    for folder, options in (("memory", []), ("disk", ["--stream"])):
        done = invarlock("run", "-c", path, "--out", folder, *options)
        assert done.code == 0, done.out + done.err
        assert "6 bits, symmetric, groups of 16; 4 bits, symmetric, groups of 32" in done.out
    memory, disk = (read_report(Path(folder)) for folder in ("memory", "disk"))
    assert [rule["keep"] for rule in memory["edit"]["plan"]["rules"]] == [True, False, False]
    of_weights = {module["name"]: module["bits"] for module in memory["edit"]["modules"]}
    assert (of_weights["model.layers.1.mlp.down_proj"], of_weights["model.layers.0.self_attn.q_proj"]) == (6, 4)
    assert "model.layers.0.mlp.up_proj" not in of_weights
    assert disk["edit"] == memory["edit"]
    assert invarlock("verify", "memory").code == 0
    for folder in ("memory", "disk"):
        saved = AutoModelForCausalLM.from_pretrained(f"{folder}/model")
        assert len(saved.model.layers[1].mlp.down_proj.weight[0, :16].unique()) <= 64
    memory["edit"]["modules"][0]["bits"] = 5
    Path("memory/report.json").write_text(json.dumps(memory))
    assert "edit.modules[0].bits: stored 5, recomputed 4" in invarlock("verify", "memory").out


@pytest.mark.parametrize(
    ("format_", "rules"),
    [
        ("compressed-tensors", MIXED),
        ("compressed-tensors", [{"match": "*.mlp.*", "format": "fp8"}, {"match": "*", "bitwidth": 4}]),
        ("gguf", [{"match": "*.down_proj", "bitwidth": 8, "group_size": 32},
                  {"match": "*.mlp.*", "bitwidth": 5, "group_size": 32},
                  {"match": "*", "bitwidth": 4, "group_size": 32}]),
    ],
)  # fmt: skip
def test_mixed_schemes_come_back_from_disk_as_they_were_judged(config, format_: str, rules: list[Any]) -> None:
    sections = {"edit": {"plan": rules}, "output": {"save_model": True, "format": format_}}
    path = config(eval={"max_pm_ratio": 100}, **sections)
    judged = run(load(str(path)), PluginManager.load(Selection()), output=OutputFolder(Path("out"))).model
    file = {"gguf_file": "model.gguf"} if format_ == "gguf" else {}
    loaded = AutoModelForCausalLM.from_pretrained("out/model", dtype="float32", **file)
    ids = torch.arange(32).view(2, 16)
    with torch.no_grad():
        assert torch.equal(judged(input_ids=ids).logits, loaded(input_ids=ids).logits)


def test_each_scheme_is_a_group_of_the_modules_it_is_for(invarlock, config) -> None:
    assert invarlock("run", "-c", config(edit={"plan": MIXED}, output={"save_model": True}), "--out", "out").code == 0
    described = json.loads(Path("out/model/config.json").read_text())["quantization_config"]
    groups = {group["weights"]["num_bits"]: group["targets"] for group in described["config_groups"].values()}
    assert sorted(groups) == [4, 6]
    assert "model.layers.2.mlp.down_proj" in groups[6]
    assert {"model.layers.0.mlp.up_proj", "lm_head"} <= set(described["ignore"])


@pytest.mark.parametrize(
    ("format_", "rules", "said"),
    [
        ("compressed-tensors", [{"match": "*.q_proj", "bitwidth": 4}, {"match": "*"}],
         "self_attn.k_proj and model.layers.0.self_attn.q_proj differently, and vLLM fuses them"),
        ("gguf", [{"match": "*.mlp.*", "bitwidth": 8, "group_size": 32}, {"match": "*", "bitwidth": 6, "group_size": 32}],
         "set edit.plan[1].bitwidth 4, 5 or 8"),
        ("state-dict", [{"match": "*"}], "it holds weights of one scheme, and edit.plan is a list of rules"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_of_a_list_is_refused(invarlock, config, module, format_, rules, said: str) -> None:
    module(
        "state_dicts",
        "from invarlock import hookimpl\nfrom invarlock.api import Exporter\n"
        "class StateDict(Exporter):\n name, streams = 'state-dict', False\n"
        "@hookimpl\ndef invarlock_exporters():\n return [StateDict()]\n",
    )
    path = config(edit={"plan": rules}, output={"save_model": True, "format": format_}, plugins=["state_dicts"])
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 2, done.out
    assert said in done.err


# -- repairing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--stream"]], ids=["memory", "stream"])
def test_a_repair_ends_with_the_model_that_its_plan_makes(invarlock, config, options: list[str]) -> None:
    text = {"provider": "demo", "seq_len": 64, "preview_n": 2, "final_n": 12}
    edit = BLAMED | {"retry": {"max_attempts": 4, "strategy": "suspects"}}
    guards = {"order": ["invariants", "reconstruction"]}
    saved = {"save_model": True, "format": "dequantized"}
    done = invarlock(
        "run", "-c", config(dataset=text, edit=edit, guards=guards, output=saved), "--out", "out", *options
    )
    report = read_report(Path("out"))
    assert done.code == 0, done.out
    first, *others = report["attempts"]
    assert (first["bitwidth"], first["bits_per_weight"], first["action"]) == (2, 2.5, "rollback")
    assert 1 <= len(others) <= 3
    assert others[-1]["bits_per_weight"] > 2.5
    assert all(attempt["seconds"] > 0 for attempt in report["attempts"])
    assert report["edit"]["plan"] == others[-1]["plan"]
    assert f"1 at 2 bits: rollback, primary metric {first['ratio']:.4g}" in done.out
    assert report["metrics"]["primary"]["ci"][1] <= 1.1
    assert invarlock("verify", "out").code == 0

    found = {name: part["bitwidth"] for part in report["edit"]["plan"]["rules"] for name in part["match"]}
    for partners in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
        for layer in range(4):
            assert len({found[f"model.layers.{layer}.{name}"] for name in partners}) == 1

    again = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32")
    quantize_model(again, mixed(*report["edit"]["plan"]["rules"]))
    left = AutoModelForCausalLM.from_pretrained("out/model", dtype="float32")
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), left.parameters(), strict=True))


def test_what_no_repair_helps_ends_rejected_after_its_attempts(invarlock, config) -> None:
    edit = BLAMED | {"retry": {"max_attempts": 2, "strategy": "suspects"}}
    done = invarlock("run", "-c", config(edit=edit, eval={"max_pm_ratio": 1.0}), "--out", "out")
    report = read_report(Path("out"))
    assert done.code == 1
    assert report["model"]["restored"] is True
    assert [attempt["action"] for attempt in report["attempts"]] == ["rollback"] * len(report["attempts"])
    assert invarlock("verify", "out").code == 0


def parts(*shares: float, bitwidth: int = 4) -> tuple[Repair, list[Part]]:
    """Weights that contribute so much to a rise, and a quarter of it with each further bit."""
    names = ("0.self_attn.o_proj", "1.self_attn.o_proj", "0.mlp.down_proj")
    by_end = {target.name.partition("layers.")[2]: target for target in find_weights(architectures.llama())}
    targets = [by_end[name] for name in names[: len(shares)]]
    first = {target.name: share for target, share in zip(targets, shares, strict=True)}

    def widen(scheme: Scheme, targets: Any) -> Scheme | None:
        return dataclasses.replace(scheme, bitwidth=scheme.bitwidth + 1) if scheme.bitwidth < 8 else None

    def contribution(targets: Any, scheme: Scheme) -> float:
        return sum(first[target.name] * 0.25 ** (scheme.bitwidth - bitwidth) for target in targets)

    repair = Repair(widen, contribution)
    return repair, repair.parts_of(targets, {target.parameter_name: Scheme(bitwidth) for target in targets})


def bits_of(rules: Rules | None) -> dict[str, int | None]:
    assert rules is not None
    return {name.partition("layers.")[2]: rule.bitwidth for rule in rules.rules for name in rule.match}


def test_bits_go_to_what_is_blamed_and_what_contributes_most_until_the_limit_is_predicted_to_hold() -> None:
    repair, found = parts(0.9, 0.05, 0.05)
    blamed = [SuspectedModule("model.layers.0.mlp", 1.0, ())]
    # 0.9 / 16, 0.05 and 0.05 / 4 are within 0.8 times 0.3 of the rise.
    assert bits_of(repair.repaired(found, blamed, 0.3)) == {
        "0.self_attn.o_proj": 6, "1.self_attn.o_proj": 4, "0.mlp.down_proj": 5,
    }  # fmt: skip
    # Where no figure is beyond a limit, what is blamed alone.
    assert bits_of(repair.repaired(found, blamed, None))["0.self_attn.o_proj"] == 4


def test_what_has_all_bits_is_left_alone_and_nothing_left_is_no_plan() -> None:
    repair, found = parts(0.5, 0.5, bitwidth=8)
    rules = as_rules([repair.widened(found[0]), found[1]])
    assert rules is not None
    assert [(rule.keep, rule.bitwidth) for rule in rules.rules] == [(True, None), (False, 8)]
    assert repair.repaired(found, [], None) is None


def test_bits_of_a_weight_count_its_scales() -> None:
    (target,) = [each for each in find_weights(architectures.llama()) if each.name.endswith("layers.0.mlp.up_proj")]
    rows, columns = target.parameter.shape
    assert PlannedWeight(target, Scheme(4, group_size=8)).bits == rows * columns * 4 + rows * columns // 8 * 16
    assert PlannedWeight(target, Scheme(4)).bits == rows * columns * 4 + rows * 16
    assert PlannedWeight(target, Scheme(8, per_channel=False)).bits == rows * columns * 8 + 16
    assert PlannedWeight.bits_of(target, None) == rows * columns * 32


# -- attribution -------------------------------------------------------------------------------------------------------


def test_an_attribution_measures_the_first_weights_and_leaves_the_edit_as_it_was(invarlock, config) -> None:
    path = config(edit={"plan": {"bitwidth": 3, "group_size": 32, "scope": "all"}})
    assert "put back" not in invarlock("run", "-c", path, "--out", "without").out
    done = invarlock("run", "-c", path, "--attribute", "2", "--out", "out")
    without, report = (read_report(Path(folder)) for folder in ("without", "out"))
    assert {module["measured"] for module in without["attribution"]["modules"]} == {None}
    assert report["model"]["fingerprint_after"] == without["model"]["fingerprint_after"]
    found = report["attribution"]
    assert found["rise"] == pytest.approx(math.log(report["metrics"]["primary"]["ratio"]))
    assert len(found["modules"]) == len(report["edit"]["modules"])
    assert sum(module["share"] for module in found["modules"]) == pytest.approx(1)
    # The second order of small errors, from two windows of 64 tokens: so much is certain.
    assert 0.5 < found["predicted"] / found["rise"] < 2
    assert 0.5 < found["additivity"] < 2
    for module in found["modules"][:2]:
        assert 0.25 < module["measured"] / module["predicted"] < 4
        assert 0.25 < module["noise"] / module["predicted"] < 4
    assert found["modules"][2]["measured"] is None
    assert f"put back alone {found['modules'][0]['measured']:.4g}" in done.out
    for form in ("report.html", "report.md"):
        invarlock("report", "out", "-o", form)
        assert f"{found['modules'][0]['measured']:.4g}" in Path(form).read_text()


def test_an_edit_of_somebody_else_is_attributed_to_the_weight_that_hurts(invarlock, demo) -> None:
    subject = copy.deepcopy(demo)
    hurt = subject.model.layers[1].mlp.down_proj.weight
    with torch.no_grad():
        # A large change where little depends on it, and a small one of what carries most.
        subject.model.layers[3].self_attn.q_proj.weight.add_(torch.randn(hurt.shape[0], hurt.shape[0]) * 0.01)
        hurt.mul_(0.5)
    subject.save_pretrained("subject")
    options = ["--baseline", DEMO / "checkpoint", "--subject", "subject", "--generated", "--attribute", "2"]
    windows = ["--set", "dataset.seq_len=64", "--set", "dataset.preview_n=2", "--set", "dataset.final_n=4"]
    invarlock("compare", *options, *windows, "--set", "guards.order=[invariants]", "--out", "out")
    found = read_report(Path("out"))["attribution"]
    assert found["modules"][0]["module"] == "model.layers.1.mlp.down_proj"
    assert found["modules"][0]["measured"] > 10 * abs(found["modules"][1]["measured"])
    assert found["additivity"] == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["run", "--demo", "--stream"], "run without --stream"),
        (["run", "--demo", "--attribute", "-1"], "option for eval.attribute: eval.attribute: expected integer >= 0"),
        (["compare", "--baseline", DEMO / "checkpoint", "--subject", DEMO / "checkpoint", "--weights-only"],
         "needs the outputs that --weights-only leaves out"),
    ],
)  # fmt: skip
def test_an_attribution_that_cannot_be_measured_is_an_error(invarlock, line: list[Any], said: str) -> None:
    attribute = [] if "--attribute" in line else ["--attribute", "1"]
    done = invarlock(*line, *attribute, "--out", "out")
    assert done.code == 2
    assert said in done.err
