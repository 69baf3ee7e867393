"""Work on weights in ``each``: all devices at once, results in the order of the weights."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from invarlock.core.progress import showing
from invarlock.distributed.parallel_map import each
from invarlock.quantization import Plan, quantize_model
from invarlock.testing import architectures
from plugins_builtin.guards.invariants import InvariantsGuard
from plugins_builtin.guards.spectral import SpectralGuard


class Elsewhere(nn.Parameter):
    """A parameter that says that it is on another device, though its memory is here."""

    device = property(lambda self: torch.device("cpu", 1))


def spread(model: nn.Module) -> nn.Module:
    """Every second layer elsewhere."""
    for layer in list(model.model.layers)[::2]:
        for module in layer.modules():
            for name, held in module.named_parameters(recurse=False):
                setattr(module, name, Elsewhere(held.detach(), requires_grad=False))
    return model


def test_devices_work_side_by_side_and_results_keep_the_order() -> None:
    weights = [parameter.detach() for parameter in architectures.llama().parameters()]
    weights[1::3] = [Elsewhere(weight, requires_grad=False) for weight in weights[1::3]]
    # Each device waits for the other at its first weight, which one thread for both would do for ever.
    meeting, first = threading.Barrier(2, timeout=20), {id(weights[0]), id(weights[1])}

    def largest(weight: torch.Tensor) -> float:
        if id(weight) in first:
            meeting.wait()
        return float(weight.abs().max())

    assert each(largest, weights) == [float(weight.abs().max()) for weight in weights]


def test_devices_tell_what_is_done_in_order() -> None:
    weights = [torch.ones(4), Elsewhere(torch.ones(4), requires_grad=False)] * 20
    told: list[tuple[int, int]] = []

    def shown(done: int, total: int) -> None:
        # Whoever is told first dawdles until the other device would have overtaken it.
        if not told:
            time.sleep(0.1)
        told.append((done, total))

    with showing(shown):
        each(lambda weight: None, weights)
    assert told == [(16 * done, 640) for done in range(1, 41)]


def test_an_exception_of_the_work_comes_as_it_is() -> None:
    def work(weight: torch.Tensor) -> None:
        raise KeyError(weight.shape[0])

    for weights in ([torch.ones(3)], [torch.ones(3), Elsewhere(torch.ones(4))]):
        with pytest.raises(KeyError, match="3"):
            each(work, weights)
    assert each(work, []) == []


@pytest.mark.parametrize("guard", [InvariantsGuard, SpectralGuard])
@pytest.mark.parametrize("bits", [8, 2])
def test_guards_say_of_a_model_on_several_devices_what_they_say_of_it_on_one(guard, bits) -> None:
    def judged(model: nn.Module) -> dict:
        asked = guard()
        asked.prepare(model, None, None, {})
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        quantize_model(model, Plan(bits, scope="all"))
        return asked.validate(model, None, {"baseline_weights": before})

    assert judged(spread(architectures.llama())) == judged(architectures.llama())
