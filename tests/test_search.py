"""Search: sensitivities, allocation, and the smallest plan that passes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from conftest import read_report, slow
from scipy.optimize import Bounds, LinearConstraint, milp
from transformers import AutoModelForCausalLM

from invarlock.core.results import Action
from invarlock.datasets.layout import Windows
from invarlock.pipeline.planning.search_state import Judged, SearchState
from invarlock.quantization import Plan, Scheme, fake_quantize_, select_targets
from invarlock.quantization.partners import partners_of
from invarlock.reporting.report import json_schema
from invarlock.search.allocation import allocate
from invarlock.search.candidates import decisions, predicted_rise
from invarlock.search.fisher import Curvature, fisher_of
from invarlock.search.frontier import best_within, smallest_within
from invarlock.search.steps import CLOSE, Tried, for_ratio
from invarlock.testing import architectures

AUTO = {"plan": {"bitwidth": "auto"}, "target": {"max_pm_ratio": 1.1}}
SMALL = {"provider": "demo", "seq_len": 64, "preview_n": 2, "final_n": 6}

# -- allocation --------------------------------------------------------------------------------------------------------


def optimum(costs: np.ndarray, sizes: np.ndarray, budget: float) -> float:
    """By integer programming."""
    once = np.kron(np.eye(len(costs)), np.ones(costs.shape[1]))
    within = LinearConstraint(sizes.reshape(1, -1), -np.inf, budget)
    found = milp(
        costs.ravel(),
        constraints=[LinearConstraint(once, 1, 1), within],
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
    )
    return float(found.fun)


@pytest.mark.parametrize("seed", range(5))
def test_an_allocation_is_the_best_but_for_one_decision(seed: int) -> None:
    random = np.random.default_rng(seed)
    sizes = np.sort(random.uniform(1, 9, (12, 5)), axis=1)
    costs = random.exponential(1, (12, 1)) * 4.0**-sizes
    for budget in (1.1 * sizes.min(1).sum(), sizes.mean(1).sum(), 2 * sizes.sum()):
        chosen = allocate(costs.tolist(), sizes.tolist(), budget)
        assert chosen is not None
        rows = np.arange(12)
        assert sizes[rows, chosen].sum() <= budget
        best = optimum(costs, sizes, budget)
        assert best - 1e-9 <= costs[rows, chosen].sum() <= best + np.ptp(costs, axis=1).max()


def test_an_allocation_of_ten_thousand_decisions_uses_up_its_budget() -> None:
    random = np.random.default_rng(0)
    sizes, costs = random.uniform(1, 9, (10_000, 14)), random.exponential(1, (10_000, 14))
    chosen = allocate(costs.tolist(), sizes.tolist(), 20_000)
    assert chosen is not None
    assert 19_999 < sizes[np.arange(10_000), chosen].sum() <= 20_000


def test_what_does_not_fit_has_no_allocation() -> None:
    assert allocate([[1.0, 0.0]], [[3.0, 4.0]], 2.9) is None
    assert allocate([[1.0, 0.0]], [[3.0, 4.0]], 3.9) == [0]
    assert allocate([[1.0], [1.0, 0.0]], [[3.0], [3.0, 4.0]], math.inf) == [0, 1]


def test_what_is_left_of_a_budget_is_spent() -> None:
    """No price of size takes one of two equal decisions and leaves the other."""
    costs, sizes = [[1.0, 0.0], [1.0, 0.0], [1.0]], [[1.0, 2.0], [1.0, 2.0], [1.0]]
    assert sum(allocate(costs, sizes, 4.0) or ()) == 1


# -- sensitivities -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(demo: Any, text: list[Any]) -> dict[str, Curvature]:
    targets = select_targets(demo, Plan(bitwidth=8, scope="all"))
    return dict(fisher_of(demo, windows(text), targets, task="causal", seed=1))


def windows(text: list[Any]) -> Windows:
    ids = torch.cat(text)
    return Windows(ids, torch.ones_like(ids), ids)


def test_sensitivities_leave_no_trace_and_are_the_same_for_a_seed(demo: Any, text: list[Any], measured: Any) -> None:
    targets = select_targets(demo, Plan(bitwidth=8, scope="ffn"))
    targets[0].parameter.requires_grad_(False)
    again = fisher_of(demo, windows(text), targets, task="causal", seed=1)
    assert not targets[0].parameter.requires_grad
    targets[0].parameter.requires_grad_(True)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in demo.parameters())
    for name, curvature in again.items():
        torch.testing.assert_close(curvature.columns, measured[name].columns)


def test_weights_that_no_window_reaches_are_taken_to_matter(demo: Any, text: list[Any]) -> None:
    model = copy.deepcopy(demo)
    model.model.layers[0].mlp.idle_proj = torch.nn.Linear(128, 64, bias=False)
    targets = select_targets(model, Plan(bitwidth=8, scope="ffn"))
    idle = next(target for target in targets if "idle" in target.name)
    found = fisher_of(model, windows(text)[:1], targets, task="causal", seed=1)
    scheme = Scheme(bitwidth=2, group_size=64, scale="fisher")
    assert predicted_rise(idle, scheme, found[idle.parameter_name]) > 0


@pytest.mark.parametrize("bits", [3, 4])
def test_the_rise_of_the_loss_is_predicted(demo: Any, text: list[Any], measured: Any, bits: int) -> None:
    """The expectation over labels drawn from the model is the KL divergence."""
    model, ids = copy.deepcopy(demo), windows(text).input_ids
    with torch.no_grad():
        before = model(input_ids=ids).logits.log_softmax(-1)
        predicted = 0.0
        for target in select_targets(model, Plan(bitwidth=bits, scope="all")):
            scheme = Scheme(bitwidth=bits, group_size=64)
            predicted += predicted_rise(target, scheme, measured[target.parameter_name])
            fake_quantize_(target.parameter, scheme)
        after = model(input_ids=ids).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert predicted == pytest.approx(divergence, rel=0.35)


def test_scales_by_the_fisher_information_lose_less_by_it(demo: Any, measured: Any) -> None:
    for target in select_targets(demo, Plan(bitwidth=8, scope="ffn"))[:2]:
        curvature = measured[target.parameter_name]
        plain, weighed = (Scheme(bitwidth=3, group_size=64, scale=scale) for scale in ("largest", "fisher"))
        assert predicted_rise(target, weighed, curvature) < 0.9 * predicted_rise(target, plain, curvature)


def test_codes_times_scales_by_the_fisher_information_are_the_rounded_weight() -> None:
    weight = torch.randn(8, 64).bfloat16()
    rounded = fake_quantize_(weight, Scheme(bitwidth=4, group_size=32, scale="fisher"), columns=torch.rand(64))
    again = (rounded.codes(weight).view(8, 2, 32) * rounded.scales.float().unsqueeze(-1)).to(weight.dtype)
    assert torch.equal(again.view(8, 64), weight)


# -- candidates and steps ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def candidates(demo: Any, measured: Any) -> Any:
    return decisions(select_targets(demo, Plan(bitwidth=8, scope="all")), Scheme(bitwidth=8), measured)


def test_fused_weights_share_a_decision(demo: Any, candidates: Any) -> None:
    targets = select_targets(demo, Plan(bitwidth=8, scope="all"))
    assert [each.names for each in candidates] == [tuple(one.name for one in each) for each in partners_of(targets)]
    assert any(len(each.names) == 3 for each in candidates)


def test_more_bits_are_predicted_to_lose_less_and_both_ways_round_agree(candidates: Any) -> None:
    plans = [best_within(candidates, bits) for bits in (3.25, 4.25, 5.25)]
    assert [plan.rise for plan in plans] == sorted((plan.rise for plan in plans), reverse=True)
    for plan, bits in zip(plans, (3.25, 4.25, 5.25), strict=True):
        assert bits - 0.1 < plan.bits_per_weight <= bits
        assert smallest_within(candidates, plan.rise).bits_per_weight <= plan.bits_per_weight + 0.01
    assert best_within(candidates, 2.0) is None


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_steps_correct_their_predictions_until_the_limit_holds(candidates: Any, factor: float) -> None:
    tried: list[Tried] = []
    limit = 1.02
    while found := for_ratio(candidates, limit, tried):
        upper = factor * found.rise * 1.05
        tried.append(Tried(found, upper, upper <= math.log(limit)))
    assert len(tried) <= 6
    accepted = min(each.bits_per_weight for each in tried if each.accepted)
    enough = smallest_within(candidates, math.log(limit) / (1.05 * factor))
    assert accepted <= enough.bits_per_weight + CLOSE


def test_steps_end_where_nothing_passes(candidates: Any) -> None:
    tried: list[Tried] = []
    while (found := for_ratio(candidates, 1.1, tried)) and len(tried) < 50:
        tried.append(Tried(found, None, False))
    assert len(tried) < 50
    assert tried[-1].bits_per_weight > 8


# -- the command line --------------------------------------------------------------------------------------------------


def searched(config: Any, target: dict[str, float] | None = None, **sections: Any) -> Path:
    plan = {"scope": "all", **({"bitwidth": "auto"} if target else {})}
    edit = {"plan": plan, "search": {"max_attempts": 3}, **({"target": target} if target else {})}
    path: Path = config(dataset=SMALL, edit=edit, **sections)
    return path


def test_the_fewest_bits_that_pass_are_found_saved_and_can_be_pasted(invarlock, config) -> None:
    path = searched(config, {"max_pm_ratio": 1.2}, output={"save_model": True})
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    points = report["search"]["points"]
    assert report["metrics"]["primary"]["limit"] == 1.2
    accepted = [point for point in points if point["action"] in ("continue", "warn")]
    assert report["attempts"][-1]["bits_per_weight"] == pytest.approx(accepted[0]["bits_per_weight"], abs=1e-3)
    assert accepted[0]["bits_per_weight"] < 5
    assert math.log(accepted[0]["predicted"]) == pytest.approx(math.log(accepted[0]["ratio"]), abs=0.05)
    assert not Path("out/search.json").exists()

    whole = {"save_model": True, "format": "dequantized"}
    pasted = config(dataset=SMALL, edit={"plan": accepted[0]["plan"]}, eval={"max_pm_ratio": 1.2}, output=whole)
    again = invarlock("run", "-c", pasted, "--out", "again")
    assert again.code == 0, again.out + again.err
    assert read_report(Path("again"))["model"]["fingerprint_after"] == report["model"]["fingerprint_after"]
    packed, unpacked = (loaded(Path(run)) for run in ("out", "again"))
    assert len(packed.config.quantization_config.quantization_config.config_groups) > 1
    ids = torch.arange(32).view(1, 32)
    assert torch.equal(packed(input_ids=ids).logits, unpacked(input_ids=ids).logits)


def loaded(run: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(run / "model", dtype="float32")


def test_the_best_plan_of_a_size_is_one_attempt(invarlock, config) -> None:
    done = invarlock("run", "-c", searched(config, {"bits_per_weight": 5.0}), "--out", "out")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    assert len(report["attempts"]) == len(report["search"]["points"]) == 1
    assert 4.9 < report["attempts"][0]["bits_per_weight"] <= 5


def test_a_target_that_nothing_meets_is_a_rejection_with_the_evidence(invarlock, config) -> None:
    done = invarlock("run", "-c", searched(config, {"max_pm_ratio": 1.0}), "--out", "out")
    assert done.code == 1, done.out + done.err
    report = read_report(Path("out"))
    assert report["search"]["points"]
    assert report["model"]["restored"] is True


def test_a_frontier_is_measured_and_its_smallest_accepted_plan_stands(invarlock, config) -> None:
    done = invarlock("search", "-c", searched(config), "--out", "out")
    assert done.code == 0, done.out + done.err
    report = read_report(Path("out"))
    points = report["search"]["points"]
    assert len(points) == 3
    assert [point["ratio"] for point in points] == sorted((point["ratio"] for point in points), reverse=True)
    smallest = next(point for point in points if point["action"] in ("continue", "warn"))
    assert report["attempts"][-1]["bits_per_weight"] == pytest.approx(smallest["bits_per_weight"], abs=1e-3)
    assert invarlock("verify", "out").code == 0
    shown = invarlock("report", "out", "--format", "markdown").out
    assert "## Plans that were searched" in shown
    page = Path("out/report.html").read_text()
    plan = page.split("<pre>edit:", 1)[1].split("</pre>")[0]
    assert yaml.safe_load("edit:" + plan)["edit"]["plan"] in [point["plan"] for point in points]


STOPPING = (
    "from pathlib import Path\nfrom invarlock import hookimpl\n"
    "@hookimpl\ndef invarlock_validate(model, context):\n"
    "    if context['attempt'] == 2 and Path('stop').exists(): raise KeyboardInterrupt\n"
    "    return {'passed': True, 'action': 'continue', 'message': 'fine'}\n"
)


@pytest.mark.parametrize("stream", [[], *slow(["--stream"])], ids=["memory", "streamed"])
def test_an_interrupted_search_goes_on_and_refuses_another_configuration(invarlock, config, module, stream) -> None:
    module("stopping", STOPPING)
    path = searched(config, guards={"order": ["stopping"]}, plugins=["stopping"])
    Path("stop").touch()
    start = ("search", "-c", path, "--out", "out", *stream)
    assert invarlock(*start).code == 130
    assert Path("out/search.json").is_file()
    Path("stop").unlink()
    other = invarlock(*start, "--seed", "3")
    assert other.code == 2
    assert "output.dir: out/search.json is of a search with another configuration" in other.err
    assert invarlock(*start).code == 0
    report = read_report(Path("out"))
    assert len(report["search"]["points"]) == 3
    assert len(report["attempts"]) <= 3
    assert not Path("out/search.json").exists()


def test_a_plan_that_is_judged_again_stands_in_the_table_once() -> None:
    state = SearchState(None, "a configuration")
    for places, ratio in (([1], 1.2), ([2], 1.1), ([1], 1.3)):
        state.add(Judged(places, ratio, None, Action.CONTINUE))
    assert [(each.places, each.ratio) for each in state.judged] == [([2], 1.1), ([1], 1.3)]


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        ({"plan": {"bitwidth": "auto"}}, "edit.plan.bitwidth: auto needs a target"),
        ({"plan": {"bitwidth": 4}, "target": {"max_pm_ratio": 1.1}}, "edit.target: is for a search"),
        (
            {"plan": {"bitwidth": "auto"}, "target": {"max_pm_ratio": 1.1, "bits_per_weight": 4}},
            "edit.target: max_pm_ratio and bits_per_weight",
        ),
        (
            {"plan": {"bitwidth": "auto"}, "target": {"max_pm_ratio": 1.1}, "search": {"max_attempts": 0}},
            "edit.search.max_attempts: expected integer 1..50",
        ),
        (
            {"plan": {"bitwidth": "auto"}, "target": {"bits_per_weight": 2}},
            "edit.target.bits_per_weight: expected number > 2.0, <= 9.0, found 2",
        ),
        (
            {"plan": {"bitwidth": "auto"}, "target": {"max_pm_ratio": 1.1}, "search": {"max_minutes": 0}},
            "edit.search.max_minutes: expected number > 0.0, found 0",
        ),
        (
            {"plan": {"bitwidth": "auto"}, "target": {"max_pm_ratio": 1.1}, "retry": {"max_attempts": 2}},
            "edit.retry.max_attempts: a search has attempts of its own",
        ),
        ({"plan": {"bitwidth": "auto", "format": "fp8"}, "target": {"max_pm_ratio": 1.1}}, "edit.plan.bitwidth: "),
        ({"plan": [{"match": "*", "bitwidth": "auto"}]}, "edit.plan[0].bitwidth: "),
        ({"plan": {"bitwidth": 4, "scale": "fisher", "symmetric": False}}, "edit.plan.scale: "),
        (
            {"plan": {"bitwidth": "auto"}, "target": {"bits_per_weight": 2.01}},
            "edit.target.bits_per_weight: the smallest",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split(":")[0],
)
def test_a_mistake_about_a_search_is_one_line_with_the_key(invarlock, config, edit: dict[str, Any], named: str) -> None:
    done = invarlock("run", "-c", config(dataset=SMALL, edit=edit), "--out", "out")
    assert done.code == 2, done.out + done.err
    assert named in done.err
    assert len(done.err.strip().splitlines()) == 1


def test_a_format_that_holds_nothing_of_a_search_is_refused(invarlock, config, tmp_path: Path) -> None:
    architectures.gpt2().save_pretrained(tmp_path / "gpt2")
    model = {"id": str(tmp_path / "gpt2"), "device": "cpu"}
    path = config(model=model, dataset={"seq_len": 16}, output={"save_model": True}, edit=AUTO)
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 2
    assert "output.format: compressed-tensors: it holds weights of Linear only" in done.err
