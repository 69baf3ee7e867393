"""The guard ``dead_rows`` and its timer."""

from dead_rows import guard

from invarlock.testing import check_guard, run_guard, tiny_model


def test_it_keeps_what_every_guard_owes():
    check_guard(guard)


def test_rounding_is_left_alone():
    assert run_guard(guard, tiny_model("bert"), 4).action == "continue"


def zero_three_rows(model):
    model.model.layers[0].self_attn.o_proj.weight[:3] = 0


def test_dead_rows_are_counted_and_named():
    result = run_guard(guard, tiny_model("llama"), zero_three_rows)
    assert (result.passed, result.action) == (False, "warn")
    assert result.metrics["suspects"] == [{"module": "model.layers.0.self_attn.o_proj", "evidence": "3 rows"}]


def test_some_can_be_allowed():
    assert run_guard(guard, tiny_model("llama"), zero_three_rows, allowed=3).action == "continue"


def test_both_are_found_and_every_guard_is_timed(invarlocker):
    listed = invarlocker.run("plugins", "--only", "ready").out
    assert "dead_rows" in listed
    assert "guard_timer" in listed
    done = invarlocker.run(
        "run", "--demo", "--set", "guards.order=[invariants, dead_rows]", "--set", "dataset.final_n=4", "--out", "out"
    )
    assert done.code == 0, done.err
    timer = done.report["extra"]["guard_timer"]
    assert list(timer["seconds"]) == ["invariants", "dead_rows"]
    assert timer["slowest"] in timer["seconds"]


def test_the_timer_can_be_turned_off(invarlocker):
    done = invarlocker.run("plugins", "hooks", "-p", "no:guard_timer")
    assert "Blocked" in done.out
