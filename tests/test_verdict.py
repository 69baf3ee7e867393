"""Results of guards, and the fold to a verdict."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from invarlock.core.errors import ExitCode
from invarlock.core.plain import plain
from invarlock.core.results import Action, Finding, GuardResult, fold


def finding(action: Action, source: str = "guard a", *, failed: bool = False) -> Finding:
    return Finding(source, action, "said so", failed=failed)


UNSURE = Finding("primary metric", Action.ROLLBACK, "straddles the limit", inconclusive=True)


def test_actions_are_ordered_by_severity() -> None:
    assert sorted(["abort", "warn", "rollback", "continue"], key=lambda name: Action(name).severity) == list(Action)


@pytest.mark.parametrize("order", [*itertools.permutations(Action, 3)])
def test_the_most_severe_action_wins_whatever_the_order(order: tuple[Action, ...]) -> None:
    verdict = fold([finding(action, f"guard {number}") for number, action in enumerate(order)])
    worst = max(order, key=lambda action: action.severity)
    assert verdict.action is worst
    assert verdict.decided_by == (f"guard {order.index(worst)}" if worst is not Action.CONTINUE else "nothing objected")


def test_nothing_said_is_continue() -> None:
    assert fold([]).action is Action.CONTINUE


@pytest.mark.parametrize(
    ("action", "strict", "code"),
    [
        ("continue", False, ExitCode.ACCEPTED), ("continue", True, ExitCode.ACCEPTED),
        ("warn", False, ExitCode.ACCEPTED), ("warn", True, ExitCode.REJECTED),
        ("rollback", False, ExitCode.REJECTED), ("abort", True, ExitCode.REJECTED),
    ],
)  # fmt: skip
def test_exit_codes(action: str, strict: bool, code: ExitCode) -> None:
    assert fold([finding(Action(action))], strict=strict).exit_code is code


def test_a_guard_that_failed_makes_it_no_verdict_to_rely_on() -> None:
    assert fold([finding(Action.ABORT, failed=True)]).exit_code is ExitCode.FAILED


def test_the_first_of_equals_decided_and_every_objection_is_a_reason() -> None:
    verdict = fold(
        [finding(Action.WARN, "guard w"), finding(Action.ABORT, "guard x"), finding(Action.ABORT, "guard y")]
    )
    assert verdict.decided_by == "guard x"
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["guard x", "guard y", "guard w"]


@pytest.mark.parametrize(
    ("others", "ending", "decided_by"),
    [
        ([], "inconclusive", "primary metric"),
        ([Action.WARN], "inconclusive", "primary metric"),
        ([Action.ROLLBACK], "rejected", "guard a"),
        ([Action.ABORT], "rejected", "guard a"),
    ],
)
def test_a_verdict_is_inconclusive_where_nothing_certain_calls_for_it(others, ending: str, decided_by: str) -> None:
    verdict = fold([UNSURE, *map(finding, others)])
    assert (verdict.ending, verdict.decided_by, verdict.accepted) == (ending, decided_by, False)
    assert verdict.exit_code is ExitCode.REJECTED


@pytest.mark.parametrize("action", Action)
def test_what_is_certain_is_accepted_or_rejected(action: Action) -> None:
    assert fold([finding(action)]).ending == ("accepted" if action.accepted else "rejected")


@pytest.mark.parametrize("action", [None, "none", "continue"])
def test_a_pass_without_an_action_continues(action: str | None) -> None:
    assert GuardResult.from_plugin("g", {"passed": True, "action": action}).action is Action.CONTINUE


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "NoneType"), ([1], "list"), ({}, "passed"), ({"passed": 1}, "passed"), ({"passed": "yes"}, "passed"),
        ({"passed": True, "action": "explode"}, "explode"), ({"passed": False}, "action"),
        ({"passed": True, "metrics": [1]}, "metrics"),
    ],
)  # fmt: skip
def test_an_incomplete_result_is_an_error_that_names_what_is_wrong(returned: object, said: str) -> None:
    result = GuardResult.from_plugin("g", returned)
    assert result.action is Action.ABORT
    assert result.passed is False
    assert result.error is not None
    assert said in result.error


def test_what_json_cannot_hold_becomes_plain() -> None:
    value = {
        "tensor": torch.ones(2), "scalar": torch.tensor(3), "nan": float("nan"), "inf": -float("inf"),
        "set": {1}, "action": Action.WARN, 5: (1, 2), "object": Action, "none": None,
    }  # fmt: skip
    made = plain(value)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert made["tensor"] == [1.0, 1.0]
    assert made["scalar"] == 3
    assert made["nan"] == "nan"
    assert made["inf"] == "-inf"
    assert made["5"] == [1, 2]
    assert made["none"] is None
