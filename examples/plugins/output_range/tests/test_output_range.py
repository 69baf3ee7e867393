"""The guard ``output_range``: what every guard owes, and what this one catches."""

import pytest
from output_range.guard import OutputRangeGuard, block_names

from invarlock.testing import check_guard, damage, run_guard, tiny_model


def test_it_keeps_what_every_guard_owes():
    check_guard(OutputRangeGuard)


@pytest.mark.parametrize("edit", [8, 4, "permuted mlp units", "norms folded into the next layer"])
def test_what_does_little_is_left_alone(edit):
    assert run_guard(OutputRangeGuard, tiny_model("llama"), edit).action == "continue"


@pytest.mark.parametrize("name", ["with bit flips", "with one NaN"])
def test_damage_is_caught_and_its_block_named_first(name):
    model = tiny_model("llama")
    edit = damage(model, name, "model.layers.0.mlp.down_proj")
    result = run_guard(OutputRangeGuard, model, edit)
    assert (result.passed, result.action) == (False, "rollback")
    assert result.metrics["suspects"][0]["module"] == "model.layers.0"


def test_the_limits_are_options():
    def enlarge(model):
        model.model.layers[1].mlp.down_proj.weight.mul_(30)

    assert run_guard(OutputRangeGuard, tiny_model("llama"), enlarge, max_growth=1.2).action == "rollback"
    result = run_guard(OutputRangeGuard, tiny_model("llama"), enlarge, max_growth=100.0, warn_growth=1.2)
    assert (result.passed, result.action) == (True, "warn")
    assert result.warnings == ("the largest output of model.layers.1 grew",)


def test_blocks_of_encoder_and_decoder_are_found():
    assert block_names(tiny_model("t5")) == ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]


def test_it_is_found_and_runs(invarlocker):
    assert "output_range" in invarlocker.run("plugins", "guards", "--only", "ready").out
    done = invarlocker.run(
        "run", "--demo", "--set", "guards.order=[output_range]", "--set", "dataset.final_n=4", "--out", "out"
    )
    assert done.code == 0, done.err
    assert [guard["name"] for guard in done.report["guards"]] == ["output_range"]
