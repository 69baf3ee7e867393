"""Reports that were changed somewhere: ``verify`` and ``report`` answer with a status and one line, never a traceback."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from amounts import examples
from conftest import read_report
from endings import COMPARED, end
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from invarlock.reporting.formats import FORMATS

KINDS = ("accepted", "rejected", "not ready", "a guard failed", "weights alone", "an infinite ratio")
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("reports")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {kind: end(root, kind, monkeypatch) for kind in KINDS}


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every key and every entry, of a long list the first two and the last."""
    if isinstance(value, dict):
        steps: list[str | int] = list(value)
    else:
        steps = sorted({0, 1, len(value) - 1} & set(range(len(value)))) if isinstance(value, list) else []
    for step in steps:
        yield (*place, step)
        yield from places(value[step], (*place, step))


def found(report: Any, place: Place) -> Any:
    for step in place:
        report = report[step]
    return report


def changed(report: Any, place: Place, change: Callable[[Any, Any], None]) -> Any:
    report = copy.deepcopy(report)
    change(found(report, place[:-1]), place[-1])
    return report


def nested(depth: int) -> Any:
    made: Any = []
    for _ in range(depth):
        made = [made]
    return made


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([
        0, -1, 2**63, 10**30, 10**400, -(10**4000), 1e308, 5e-324, math.nan, math.inf, "nan", "inf", "-inf", "", "\x1b[2J\n\u202e",
        "continue", "abort", "A" * 100_000, [], {}, [[]], [None], {"": None}, {"module": []}, nested(150), nested(990), [1.0] * 1000,
        [0, 0, 0, 0], [1e308] * 4, ["nan"] * 4,
    ]),
    st.recursive(st.none() | st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)),
)  # fmt: skip
thorough = settings(
    max_examples=examples(1_000), deadline=None, suppress_health_check=list(HealthCheck), print_blob=False
)


@thorough
@given(st.sampled_from(KINDS), st.data())
def test_any_change_is_answered_in_one_line(reports, invarlock, kind: str, data: st.DataObject) -> None:
    report = read_report(reports[kind])
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from([*places(report)]))
        value = data.draw(VALUES)
        change = data.draw(st.sampled_from(["set", "delete", "nest", "double"]))
        if change == "set":
            report = changed(report, place, lambda parent, key, value=value: parent.__setitem__(key, value))
        elif change == "delete":
            report = changed(report, place, lambda parent, key: parent.__delitem__(key))
        elif change == "nest":
            report = changed(report, place, lambda parent, key: parent.__setitem__(key, [parent[key]]))
        else:
            report = changed(report, place, lambda parent, key: parent.__setitem__(key, [parent[key]] * 2))
    folder = Path("changed")
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    answered(invarlock("verify", folder))
    format_ = data.draw(st.sampled_from(FORMATS).map(lambda form: form.name))
    answered(invarlock("report", folder, "--format", format_), (0, 2))
    answered(invarlock("report", folder, reports["accepted"], "--format", format_), (0, 2))


def answered(done: Any, codes: tuple[int, ...] = (0, 1, 2)) -> None:
    assert done.code in codes, done.err
    assert "Traceback" not in done.err
    if done.code == 2:
        assert done.err.count("\n") == 1, done.err


RECOMPUTED = [
    ("metrics", "primary"), ("metrics", "windows"), ("attempts", -1), ("config", "eval"), ("config", "edit"), ("edit", "plan"),
    ("edit", "params_changed"), ("edit", "modules", 0, "bits"), ("edit", "modules", -1, "parameters"), ("edit", "modules", 0, "relative_error"),
    ("edit", "modules", 0, "change"), ("guards", 0, "passed"), ("guards", 0, "action"), ("guards", 1, "passed"), ("guards", 1, "action"),
    ("guards", 0, "message"), ("guards", 0, "name"), ("verdict", "action"), ("verdict", "accepted"), ("verdict", "decided_by"),
    ("verdict", "findings"), ("verdict", "reasons"), ("verdict", "exit_code"), ("verdict", "rests_on"), ("verdict", "suspects"),
    ("model", "restored"), ("model", "id"), ("metrics", "predictions", "window_p95"), ("metrics", "predictions", "action"),
    ("metrics", "predictions", "message"), ("metrics", "predictions", "limits", "kl_mean"), ("config_sha256",),
]  # fmt: skip
WORDS = {
    "continue": "abort",
    "warn": "continue",
    "rollback": "continue",
    "abort": "warn",
    "perplexity": "masked_perplexity",
}


def leaves(value: Any, place: Place) -> list[Place]:
    below = [each for each in places(value) if not isinstance(found(value, each), dict | list)]
    return [(*place, *each) for each in below] or [place]


def another(value: Any) -> Any:
    """A different value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.001 + 0.001
    return WORDS.get(value, f"{value}x") if isinstance(value, str) else "x"


@thorough
@given(st.sampled_from(KINDS), st.sampled_from(RECOMPUTED), st.data())
def test_a_changed_figure_that_is_recomputed_disagrees(reports, invarlock, kind: str, place: Place, data: Any) -> None:
    report = read_report(reports[kind])
    try:
        value = found(report, place)
    except (KeyError, IndexError, TypeError):
        assume(False)
    assume(kind not in COMPARED or place[-1] not in ("parameters", "relative_error"))
    # A ratio that is infinite stays so, whatever becomes of one window.
    assume(kind != "an infinite ratio" or place != ("metrics", "windows"))
    # A warning goes with either.
    assume(place[0] != "guards" or place[-1] != "passed" or found(report, place[:-1])["action"] != "warn")
    leaf = data.draw(st.sampled_from(leaves(value, place)))
    value = found(report, leaf)
    # Where the subject lay is no figure.
    assume(value is not None and not isinstance(value, dict | list) and leaf[-1] != "subject")
    report = changed(report, leaf, lambda parent, key: parent.__setitem__(key, another(value)))
    folder = Path("changed")
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    done = invarlock("verify", folder)
    answered(done, (1, 2))
    # Other text may be none that a report can hold, and so may another configuration.
    assert done.code == 1 or isinstance(value, str) or leaf[0] == "config" or leaf[-1] == "restored", done.err
