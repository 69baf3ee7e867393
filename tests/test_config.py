"""The configuration: precedence, and mistakes that are one line with file, line, key and the nearest known key."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from invarlock.config.loading import json_schema, load
from invarlock.config.schema import keys
from invarlock.core.errors import UsageError


def written(text: str) -> str:
    Path("run.yaml").write_text(text)
    return "run.yaml"


def test_only_the_model_is_required_and_the_rest_has_defaults() -> None:
    config = load(written("model: {id: here}\n"))
    assert config.edit.plan.bitwidth == 8
    assert config.dataset.provider == "generated"
    assert config.eval.max_pm_ratio == 1.10


def test_command_line_over_file_over_defaults() -> None:
    path = written("model: {id: here}\nedit: {plan: {bitwidth: 4, scope: attn}}\n")
    config = load(path, ["edit.plan.bitwidth=3", "guards.order=[a, b]", "guards.a.limit=0.5"], {"model.device": "cpu"})
    assert config.edit.plan.bitwidth == 3
    assert config.edit.plan.scope == "attn"
    assert config.guards.order == ("a", "b")
    assert config.guards.options == {"a": {"limit": 0.5}}
    assert config.model.device == "cpu"


def test_options_of_guards_stand_beside_the_order() -> None:
    config = load(written("model: {id: here}\nguards: {order: [nan_check], nan_check: {strict: true}}\n"))
    assert config.guards.options == {"nan_check": {"strict": True}}
    assert config.as_dict()["guards"] == {"order": ("nan_check",), "fail_fast": False, "nan_check": {"strict": True}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {id: here}\nedit:\n  plan:\n    bits: 3\n", ["run.yaml:4: edit.plan.bits", "bitwidth"]),
        ("model: {id: here}\nmodle: 3\n", ["run.yaml:2: modle", "'model'"]),
        ("model: {id: here}\nbitwidth: 3\n", ["run.yaml:2: bitwidth", "'edit.plan.bitwidth'"]),
        ("model: {id: here}\nmodel: {id: there}\n", ["run.yaml:2: model", "twice"]),
        ("model: {id: here}\nedit: {plan: {bitwidth: 1}}\n", ["run.yaml:2: edit.plan.bitwidth", "2..8", "1"]),
        ("model: {id: here}\nedit: {plan: {bitwidth: true}}\n", ["run.yaml:2: edit.plan.bitwidth", "true"]),
        ("model: {id: here}\nedit: {plan: {bitwidth: '8'}}\n", ["run.yaml:2: edit.plan.bitwidth", "'8'"]),
        ("model: {id: here}\nedit: {plan: {scope: fnn}}\n", ["run.yaml:2: edit.plan.scope", "'ffn'"]),
        ("model: {id: here}\nedit: {plan: {clamp_ratio: 0.9}}\n", ["edit.plan.clamp_ratio", "0.0..0.5", "0.9"]),
        ("model: {id: here}\nguards: {order: invariants}\n", ["run.yaml:2: guards.order", "list"]),
        ("model: {id: here}\nguards: {ordr: [a]}\n", ["run.yaml:2: guards.ordr", "'order'"]),
        ("model: {id: here}\ndataset: {provider: local_jsonl}\n", ["dataset.path", "required"]),
        ("model: {id: here}\ndataset: {seq_len: 64, stride: 32}\n", ["dataset.stride", "seq_len"]),
        ("model: {id: here}\nedit: {plan: {group_size: 8, per_channel: false}}\n", ["edit.plan.group_size"]),
        ("model: here\n", ["run.yaml:1: model", "mapping", "'here'"]),
        ("edit: {}\n", ["model", "required"]),
        ("- a\n", ["run.yaml", "mapping"]),
        ("", ["run.yaml", "empty"]),
        ("model: {id: here\n", ["run.yaml:2", "YAML"]),
        ("model: {id: !!python/object/apply:os.getcwd []}\n", ["run.yaml:1: model.id", "python"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_says_where(text: str, said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        load(written(text))
    line = str(caught.value)
    assert "\n" not in line
    assert all(part in line for part in said), line


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("edit.plan.bitwdth=2", "bitwidth"), ("edit.plan.bitwidth", "KEY=VALUE"), ("model.id.x=2", "id"),
        ("edit.plan.bitwidth=[", "YAML"), ("edit.plan.bitwidth=9", "2..8"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_names_the_setting(setting: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"--set {setting.split('=')[0]}") as caught:
        load(written("model: {id: here}\n"), [setting])
    assert said in str(caught.value)


def test_a_missing_file_and_a_folder_are_said() -> None:
    with pytest.raises(UsageError, match=r"/nowhere\.yaml does not exist"):
        load("nowhere.yaml")
    with pytest.raises(UsageError, match="folder"):
        load(".")


def test_the_schema_accepts_what_the_loader_accepts(invarlock) -> None:
    schema = json.loads(invarlock("config", "--schema").out)
    assert schema == json_schema()
    good = {"model": {"id": "here"}, "guards": {"order": ["a"], "a": {"x": 1}}, "edit": {"plan": {"bitwidth": 4}}}
    jsonschema.validate(good, schema)
    for bad in ({}, {"model": {"id": "here", "idd": 1}}, {"model": {"id": "here"}, "edit": {"plan": {"bitwidth": 1}}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_every_key_has_a_sentence_and_stands_in_the_help(invarlock) -> None:
    text = " ".join(invarlock("run", "--help").out.split())
    for key in keys():
        assert key.path in text
        assert " ".join(key.sentence.split()) in text
