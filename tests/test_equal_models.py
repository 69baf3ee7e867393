"""Comparisons of models that are alike: what is not measured twice changes nothing of the report."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from invarlock.models.fingerprint import Fingerprint, named_tensors
from invarlock.models.roomy_cache import RoomyLayer
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline.calibration import Calibration
from invarlock.pipeline.changes import find_changes
from invarlock.pipeline.clock import Clock
from invarlock.pipeline.keeping import Loaded, Prints
from invarlock.quantization.changes import CHANGED
from invarlock.quantization.selection import find_weights
from invarlock.testing import architectures
from plugins_builtin.guards.reconstruction import ReconstructionGuard, errors
from plugins_builtin.guards.spectral import SpectralGuard

BUILDERS = [architectures.llama, architectures.llama_tied, architectures.gpt2]
COMPARING = Calibration(None, comparing=True)


def noisy(model: nn.Module, *words: str) -> nn.Module:
    """A copy with noise on the parameters whose name has one of some words."""
    edited = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in edited.named_parameters():
            if any(word in name for word in words):
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return edited


def context_of(snapshot: Snapshot, edited: nn.Module) -> dict[str, Any]:
    """As ``validate`` of a comparison gets it."""
    found = find_changes(edited, snapshot.parameters().lent).tensors
    modules = [{"name": tensor.name, "change": tensor.change} for tensor in found]
    return {"edit": {"modules": modules}, "baseline_weights": snapshot.parameters()}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("words", [(), ("1.",), ("",)], ids=["none", "a block", "all"])
def test_spectral_finds_the_same_of_weights_that_it_measures_late(build: Any, words: tuple[str, ...]) -> None:
    model = build()
    edited, snapshot = noisy(model, *words), Snapshot(model)
    found = []
    for calib in (None, COMPARING):
        guard = SpectralGuard()
        assert guard.prepare(model, None, calib, {})["matrices"] >= 10
        found.append(guard.validate(edited, None, context_of(snapshot, edited)))
    assert found[0] == found[1]
    assert bool(found[0]["metrics"]["suspects"]) == bool(words)


def test_spectral_knows_weights_that_are_not_finite_on_both_sides() -> None:
    model = architectures.llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    guard = SpectralGuard()
    guard.prepare(model, None, COMPARING, {})
    result = guard.validate(model, None, context_of(Snapshot(model), model))
    assert result["passed"] and result["metrics"]["not_measured"] == ["model.layers.0.mlp.up_proj"]


def test_reconstruction_runs_no_part_of_an_equal_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.llama()
    guard, context = ReconstructionGuard(), context_of(Snapshot(model), model)
    guard.prepare(model, None, COMPARING, {})
    ran = guard.validate(copy.deepcopy(model), None, {})
    judged: list[Any] = []
    monkeypatch.setattr(errors.Reference, "judge", lambda self, edited: judged.append(edited) or self.unedited)
    assert guard.validate(copy.deepcopy(model), None, context) == ran
    assert not judged
    other_norm, hooked, weights = copy.deepcopy(model), copy.deepcopy(model), noisy(model, "up_proj")
    other_norm.model.norm.variance_epsilon = 1.0
    hooked.model.norm.register_forward_hook(lambda module, args, output: 2 * output)
    for edited in (other_norm, hooked, weights):
        guard.validate(edited, None, context_of(Snapshot(model), edited))
    assert judged == [other_norm, hooked, weights]


@pytest.mark.parametrize("build", BUILDERS)
def test_equal_tensors_take_over_digests(build: Any) -> None:
    model, clock = build(), Clock()
    edited, before = noisy(model, "1."), Prints.of(model, clock)
    assert before.fingerprint == Fingerprint.of(model)
    assert Prints.of(edited, clock, before.by_mark).fingerprint == Fingerprint.of(edited) != before.fingerprint


@pytest.mark.parametrize("build", BUILDERS)
def test_tensors_of_equal_marks_are_not_compared_with_the_baseline(build: Any) -> None:
    model, clock = build(), Clock()
    edited = noisy(model, "1.")
    with torch.no_grad():
        for each in (model, edited):
            find_weights(each)[0].parameter[0, 0] = torch.nan
    equal = Prints.of(edited, clock).marks.shared_with(Prints.of(model, clock).marks)
    assert equal and not any("1." in name for name in equal)
    before = Snapshot(model).parameters().lent
    assert find_changes(edited, before, equal=equal) == find_changes(edited, before)
    unlike = Snapshot(noisy(model, "")).parameters().lent
    found = find_changes(edited, unlike, equal=equal).tensors
    assert Counter(each.change for each in found if "1." not in each.name)[CHANGED] == 1


class Touched:
    """Ways to change a tensor that torch counts, and ways around it."""

    @staticmethod
    def in_place(model: nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).add_(1)

    @staticmethod
    def other_storage(model: nn.Module) -> None:
        parameter = next(model.parameters())
        parameter.data = parameter.data + 1

    @staticmethod
    def around(model: nn.Module) -> None:
        next(model.parameters()).data.numpy()[:] += 1


@pytest.mark.parametrize("build", BUILDERS)
def test_a_quick_look_sees_what_torch_counts_and_a_thorough_one_all(build: Any) -> None:
    model = build()
    snapshot = Snapshot(model)
    loaded = Loaded.of(model, Clock(), lambda: snapshot.restore(model))
    assert not loaded.undo()
    for change in (Touched.in_place, Touched.other_storage):
        change(model)
        assert loaded.undo(quick=True) and not loaded.undo(quick=True) and not loaded.undo()
    Touched.around(model)
    assert not loaded.undo(quick=True)
    assert loaded.undo() and not loaded.undo()


def test_a_quick_look_reads_tensors_of_which_torch_counts_nothing() -> None:
    with torch.inference_mode():
        model = nn.Linear(4, 4)
        loaded = Loaded.of(model, Clock())
        assert not loaded.undo(quick=True)
        model.weight.add_(1)
    assert loaded.undo(quick=True) == ["weight"]


def test_lent_weights_are_the_snapshots_own_and_others_copies() -> None:
    model = architectures.llama_tied()
    snapshot = Snapshot(model)
    weights = snapshot.parameters()
    name = next(name for name, _ in named_tensors(model))
    assert weights.lent[name].data_ptr() == weights.lent[name].data_ptr() != weights[name].data_ptr()
    weights[name].zero_()
    assert torch.equal(weights[name], weights.lent[name]) and weights[name].any()


def test_keys_and_values_stay_where_they_are_as_they_grow() -> None:
    from invarlock.models.decoding import Growing

    model = architectures.llama().eval()
    rows = torch.randint(96, (2, 9), generator=torch.Generator().manual_seed(0))
    growing = Growing(model, 8, lambda rows, fresh: {"input_ids": fresh})
    with torch.no_grad():
        last = [growing(rows[:, :3], rows[:, :3])]
        layers = growing.given["past_key_values"].layers
        assert all(type(layer) is RoomyLayer for layer in layers)
        places = [layer.rooms[0].data_ptr() for layer in layers]
        last += [growing(rows[:, : place + 1], rows[:, place : place + 1]) for place in range(3, 8)]
        assert [layer.keys.data_ptr() for layer in layers] == places
        last.append(growing(rows, rows[:, 8:]))
        expected = model(rows).logits[:, 2:]
    torch.testing.assert_close(torch.stack(last, 1), expected)
