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
        ("model: {id: here}\ndataset: {path: a.jsonl}\n", ["run.yaml:2: dataset.path", "provider: local_jsonl"]),
        ("model: {id: here}\ndataset: {seq_len: 64, stride: 32}\n", ["dataset.stride", "seq_len"]),
        ("model: {id: here}\nedit: {plan: {group_size: 8, per_channel: false}}\n", ["edit.plan.group_size"]),
        ("model: {id: here}\nedit: {plan: {include: ['re:(']}}\n", ["run.yaml:2: edit.plan.include", "no regular"]),
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


BOMB = "x-0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x-{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("guards: {a: {x: no}}", ["guards.a.x", "quote it"]),
        ("guards: {a: {x: 010}}", ["guards.a.x", "quote it"]),
        ("guards: {a: {x: 1:30}}", ["guards.a.x", "quote it"]),
        ("guards: {a: {x: 0b}}", []),
        ("guards: {a: {x: 2024-13-45}}", []),
        ("guards: {a: {x: !!int word}}", ["guards.a.x"]),
        ("guards: {a: {x: !!timestamp 2024-13-45}}", ["guards.a.x", "tag"]),
        ("guards: {a: {x: !!binary a}}", ["guards.a.x", "tag"]),
        ("guards: {a: {x: 12345678901234567890123}}", ["guards.a.x", "23 digits"]),
        ("eval: {max_pm_ratio: .inf}", ["eval.max_pm_ratio", "finite"]),
        ("eval: {max_pm_ratio: .nan}", ["eval.max_pm_ratio", "finite"]),
        ("eval: {max_pm_ratio: 1e999}", ["eval.max_pm_ratio", "finite"]),
        ("guards: {a: &x {y: *x}}", ["guards.a.y", "no end"]),
        ("guards: {a: {x: " + "[" * 50 + "]" * 50 + "}}", ["guards.a.x", "deep"]),
        ("guards: {a: {x: " + "[" * 5000 + "]" * 5000 + "}}", ["deep"]),
        (BOMB + "guards: {a: {x: *a11}}", ["aliases are expanded"]),
        ("guards: {a: {<<: 5}}", ["guards.a", "<<"]),
        ("guards: {a: *nobody}", ["YAML"]),
        ("guards: {? [1] : 2}", ["a key has to be a word"]),
    ],
)  # fmt: skip
def test_scalars_aliases_and_depth_that_readers_choke_on(text: str, said: list[str]) -> None:
    if not said:
        load(written(f"model: {{id: here}}\n{text}\n"))
        return
    with pytest.raises(UsageError) as caught:
        load(written(f"model: {{id: here}}\n{text}\n"))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in said), caught.value


def test_numbers_merges_and_keys_for_anchors_are_read() -> None:
    text = (
        "x-plan: &plan {bitwidth: 4, clamp_ratio: 1e-3}\nmodel: {id: here}\n"
        "edit: {plan: {<<: *plan, bitwidth: 5}}\nguards: {a: {day: 2024-05-01, word: 'no'}}\n"
    )
    config = load(written(text))
    assert (config.edit.plan.bitwidth, config.edit.plan.clamp_ratio) == (5, 0.001)
    assert config.guards.options == {"a": {"day": "2024-05-01", "word": "no"}}


@pytest.mark.parametrize(
    "setting", ["eval.max_pm_ratio=.inf", "guards.a.x=no", "guards.a.x=!!int word", "guards.a.x=*y"]
)
def test_a_setting_is_read_as_the_file_is(setting: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        load(written("model: {id: here}\n"), [setting])


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
