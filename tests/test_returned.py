"""What guards and plugins return: each kind of it is data, or an error that names what is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_report

from invarlock.core.plain import plain
from invarlock.core.results import Action, GuardResult, PrepareResult
from invarlock.core.sections import ReportSection, extra_from_plugin

FINE = {"passed": True, "action": "continue", "message": "fine"}


def judged(**changes: Any) -> GuardResult:
    return GuardResult.from_plugin("g", FINE | changes)


class Endless(Sequence):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, place: Any) -> Any:
        return place


class Broken:
    def __str__(self) -> str:
        raise SystemExit(0)


def cyclic() -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["again"] = made
    return made


def nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = {"deeper": made}
    return made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"passed": torch.tensor(True)}, "'passed' is a Tensor, use bool()"),
        ({"passed": np.bool_(True)}, "'passed' is a numpy.bool, use bool()"),
        ({"passed": 1}, "'passed' is an int, use bool()"),
        ({"passed": "no"}, "'passed' is a str, say True or False"),
        ({"passed": None}, "'passed' is a NoneType, say True or False"),
        ({"passed": False}, "'passed' is False and 'action' is 'continue', which contradict each other"),
        ({"passed": False, "action": "none"}, "contradict each other"),
        ({"action": "rollback"}, "'passed' is True and 'action' is 'rollback', which contradict each other"),
        ({"action": "ABORT"}, "unknown action 'ABORT'; did you mean 'abort'?"),
        ({"action": []}, "unknown action 'a list'"),
        ({"action": 0}, "unknown action 'an int'"),
        ({"action": False}, "unknown action 'a bool'"),
        ({"action": ""}, "unknown action ''"),
        ({"warnings": 5}, "'warnings' is an int, not a list"),
        ({"warnings": object()}, "'warnings' is an object, not a list"),
        ({"warnings": {"a": 1}}, "'warnings' is a dict, not a list"),
        ({"metrics": [1]}, "'metrics' is a list, not a dict"),
        ({"metrics": cyclic()}, "metrics.again: it holds itself"),
        ({"metrics": nested(5000)}, "it is nested more than 32 deep"),
        ({"metrics": {"a": 10**5000}}, "metrics.a: an integer of 16,610 bits is too large"),
        ({"metrics": {"a": [Broken()]}}, "metrics.a[0]: a Broken raises SystemExit"),
        ({"metrics": {1: "a", "1": "b"}}, "metrics: two keys read '1'"),
        ({"message": Broken()}, "message: a Broken raises SystemExit"),
    ],
)
def test_a_wrong_result_is_an_error_that_names_what_is_wrong(changes: dict[str, Any], said: str) -> None:
    result = judged(**changes)
    assert (result.passed, result.action) == (False, Action.ABORT)
    assert said in result.message
    assert result.error


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"a": Endless()}}, "cut: metrics.a: the first 10,000 values are kept"),
        ({"metrics": {"a": [0] * 2_000_000}}, "cut: metrics.a: 10,000 of 2,000,000 values are kept"),
        ({"metrics": {"a": [[0] * 9_000] * 20}}, "cut: metrics.a[11]: "),
        ({"metrics": {"a": torch.ones(100, 100)}}, "cut: metrics.a: a tensor is cut to its shape"),
        ({"metrics": {"a": "x" * 100_000}}, "cut: metrics.a: 10,000 of 100,000 characters are kept"),
        ({"message": "A" * 100_000_000}, "cut: message: 4,000 of 100,000,000 characters are kept"),
        ({"warnings": (str(number) for number in itertools.count())}, "cut: warnings: the first "),
        ({"warnings": ["w" * 5_000] * 5_000}, "cut: warnings[0]: 1,000 of 5,000 characters are kept"),
    ],
)
def test_what_is_too_long_is_cut_and_that_is_said(changes: dict[str, Any], said: str) -> None:
    result = judged(**changes)
    assert (result.passed, result.error) == (True, None)
    assert result.warnings[-1].startswith(said)
    assert len(json.dumps([result.message, result.warnings, result.metrics])) < 2_000_000


def test_tensors_of_every_kind_are_data() -> None:
    made = plain(
        {
            "number": torch.tensor(2.5, requires_grad=True), "few": torch.tensor([1, 2], dtype=torch.int8),
            "meta": torch.ones(3, device="meta"), "sparse": torch.ones(2, 2).to_sparse(), "numpy": np.float32(0.5),
        }
    )  # fmt: skip
    assert made["number"] == 2.5 and made["few"] == [1, 2] and made["numpy"] == 0.5
    assert made["meta"] == "Tensor of shape (3,), torch.float32"
    assert made["sparse"] == "Tensor of shape (2, 2), torch.float32"


def test_warnings_are_texts_whatever_lists_them() -> None:
    assert judged(warnings="one").warnings == ("one",)
    assert judged(warnings=map(str, range(2))).warnings == ("0", "1")
    assert judged(warnings=[3, None, {"a": [1]}]).warnings == ("3", "", '{"a": [1]}')


def test_a_guard_that_measured_nothing_neither_passes_nor_fails() -> None:
    result = judged(passed=False, metrics={"measured": False})
    assert (result.passed, result.action, result.error) == (None, Action.CONTINUE, None)


def test_an_error_of_any_length_is_kept_at_both_ends() -> None:
    result = GuardResult.failed("g", "m" * 10**6, "Traceback" + "x" * 10**6 + "the end")
    assert len(result.message) == 4_000
    assert result.error is not None and len(result.error) < 21_000
    assert result.error.startswith("Traceback") and result.error.endswith("the end")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"ready": "no"}, "'ready' is a str, say True or False"), ({"ready": None}, "'ready' is a NoneType"),
        ({"ready": np.bool_(False)}, "use bool()"), ([1], "prepare returned a list, not a dict with 'ready'"),
        ({"ready": True, "x": cyclic()}, "prepare.x.again: it holds itself"), (Broken(), "prepare returned a Broken"),
    ],
)  # fmt: skip
def test_what_prepare_returns_wrongly_is_an_error(returned: Any, said: str) -> None:
    result = PrepareResult.from_plugin(returned)
    assert result.ready is False
    assert result.message is not None and said in result.message


def test_what_prepare_returns_is_kept() -> None:
    assert PrepareResult.from_plugin(None).ready
    assert PrepareResult.from_plugin({"seen": 3}) == PrepareResult({"seen": 3})
    assert not PrepareResult.from_plugin({"ready": False}).ready
    assert PrepareResult.from_plugin({"x": Endless()}).returned["cut"] == "prepare.x: the first 10,000 values are kept"


def test_sections_have_limits_that_are_said() -> None:
    table = {"title": "t", "columns": ["a", "b"], "rows": [[1, torch.tensor(2)]] * 5_000}
    [section] = ReportSection.all_from_plugin("p", [table])
    assert len(section.rows) == 2_000 and section.rows[0] == [1, 2]
    assert section.text == "cut: section.rows: 2,000 of 5,000 values are kept"
    many = ReportSection.all_from_plugin("p", ({"title": str(number)} for number in itertools.count()))
    assert len(many) == 20 and many[-1].text == "cut: the first 20 sections of the plugin are kept"
    wide = {"title": "t", "columns": ["c"] * 300, "rows": [["x"] * 300] * 300}
    assert {len(row) for row in ReportSection.from_plugin("p", wide).rows} == {300}


@pytest.mark.parametrize("returned", [5, Broken(), [{"title": Broken()}], [cyclic()], [{"title": "t", "rows": 1}]])
def test_sections_that_are_none_are_refused(returned: Any) -> None:
    with pytest.raises(ValueError, match=r"section|raises|int"):
        ReportSection.all_from_plugin("p", returned)


def test_extra_is_a_dict_of_data() -> None:
    assert extra_from_plugin(None) == {}
    assert extra_from_plugin({"ticket": np.int64(7)}) == {"ticket": 7}
    with pytest.raises(ValueError, match="returned a list"):
        extra_from_plugin([1])


GUARD = """
from invarlock import hookimpl

@hookimpl
def invarlock_validate(model, adapter, context):
    again = {{}}
    again["again"] = again
    return {{"passed": True, "action": "continue", "message": "fine", {entry}}}
"""


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("'metrics': again", "it holds itself"), ("'metrics': {'a': 10 ** 5000}", "too large"),
        ("'warnings': 5", "'warnings' is an int"), ("'action': []", "unknown action"),
        ("'passed': False", "contradict"), ("'passed': (model.lm_head.weight == 0).any()", "is a Tensor, use bool()"),
    ],
)  # fmt: skip
def test_a_wrong_result_ends_with_3_and_keeps_what_others_found(
    invarlock, module, config, entry: str, said: str
) -> None:
    module("wrong", GUARD.format(entry=entry))
    order = {"order": ["invariants", "wrong", "hello_guard"]}
    assert invarlock("run", "-c", config(guards=order), "-p", "wrong", "--out", "out").code == 3
    report = read_report(Path("out"))
    assert [guard["passed"] for guard in report["guards"]] == [True, False, True]
    assert said in report["guards"][1]["message"]
    assert report["verdict"]["decided_by"] == "guard wrong"
    assert invarlock("verify", "out").code == 0
