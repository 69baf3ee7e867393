"""The diagonal of the Fisher information: how much a small change of each weight raises the loss.

With labels drawn from the model itself the gradient is zero on average, so the rise of the loss is of second order. Its
curvature is then the Fisher information, whose diagonal is the mean of the squared gradients (Kunstner et al. 2019,
"Limitations of the empirical Fisher approximation": labels of the text in place of drawn ones would not give it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.progress import counted
from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.evaluation.passes import predicted_tokens, uncached_logits
from invarlock.models.autograd import recording
from invarlock.models.facts import Predicted, device_of, evaluating
from invarlock.quantization.selection import WeightTarget


@dataclass(frozen=True)
class Curvature:
    """The diagonal for one weight (..., out, in), per scored token, as the product of a factor a row and one a column.

    The gradient at a linear layer is that of its output times its input; their squares are taken as independent, as in
    Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature". That takes no
    memory to speak of, and has less noise than single squares of a few windows.
    """

    rows: Tensor
    """Float32 (..., out)."""
    columns: Tensor
    """Float32 (..., in)."""

    def rise(self, change: Tensor) -> float:
        """The predicted rise of the loss, nats per token, from a change (..., out, in), which is overwritten."""
        of_rows = (change.square_() @ self.columns.unsqueeze(-1)).squeeze(-1)
        return 0.5 * float((of_rows * self.rows).sum())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight (..., out, in)."""
        return (*self.rows.shape, self.columns.shape[-1])

    @property
    def is_finite(self) -> bool:
        return bool(self.rows.isfinite().all() and self.columns.isfinite().all())

    @classmethod
    def even(cls, shape: Sequence[int], of_rows: float, device: torch.device) -> Curvature:
        """One of a weight (..., out, in) in which no row and no column matters more than any other."""
        *experts, rows, columns = shape
        full = partial(torch.full, dtype=torch.float32, device=device)
        return cls(full([*experts, rows], of_rows), full([*experts, columns], 1 / columns))


Fisher = Mapping[str, Curvature]
"""Of weights, by the name of the parameter."""


@dataclass(frozen=True)
class BaselineFisher:
    """The curvature of a baseline, or the reason that there is none."""

    fisher: Fisher | None
    missing: str = ""
    """The reason; empty where there is a curvature."""


def fisher_of(
    model: nn.Module, windows: Windows, targets: Sequence[WeightTarget], *, task: Predicted, seed: int
) -> Fisher:
    """The curvature at some weights, from one run of each window forward and back.

    Labels of one window are drawn independently of each other, so that the square of the sum of their gradients has the
    sum of their squares for a mean. Each gradient is squared and freed as soon as it is there.

    :param windows: of text that the verdict does not rest on.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {target.parameter_name: _Sums.of(target) for target in targets}
    tokens = 0
    with evaluating(model), _squared_into(model, targets, sums), recording(windows.length, device_of(model)):
        for window in counted([*windows.batches(1)]):
            scored = predicted_tokens(window, task) != UNSCORED
            logits = uncached_logits(model, window)[scored].float()
            drawn = _drawn(logits.detach(), generator)
            torch.autograd.backward(functional.cross_entropy(logits, drawn, reduction="sum"))
            tokens += len(drawn)
    return _unreached_as_others({name: total.curvature(tokens) for name, total in sums.items()})


@dataclass
class _Sums:
    """Sums of squared gradients of one weight (..., out, in), by its rows and by its columns."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, target: WeightTarget) -> _Sums:
        *experts, rows, columns = target.layout.matrices(target.parameter).shape
        zeros = partial(torch.zeros, dtype=torch.float32, device=target.parameter.device)
        return cls(zeros([*experts, rows]), zeros([*experts, columns]))

    def add(self, gradient: Tensor) -> None:
        squares = gradient.float().square()
        self.rows += squares.sum(-1)
        self.columns += squares.sum(-2)

    def curvature(self, tokens: int) -> Curvature:
        total = self.columns.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return Curvature(self.rows / max(tokens, 1), self.columns / total)


def _unreached_as_others(found: Fisher) -> Fisher:
    """Weights that no window reached, as some experts, matter as the median of the others: nothing tells otherwise."""
    reached = [each for each in found.values() if each.rows.any()]
    usual = torch.stack([each.rows.mean().cpu() for each in reached]).median() if reached else torch.zeros(())
    return {name: each if each.rows.any() else _even_as(each, float(usual)) for name, each in found.items()}


def _even_as(other: Curvature, of_rows: float) -> Curvature:
    return Curvature.even(other.shape, of_rows, other.rows.device)


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of logits, drawn by its probability."""
    # The largest of probabilities over exponential numbers; on the CPU, so that a seed draws the same on every device.
    noise = torch.empty(logits.shape).exponential_(generator=generator).log_().to(logits.device)
    return logits.log_softmax(-1).sub_(noise).argmax(-1)


@contextmanager
def _squared_into(model: nn.Module, targets: Sequence[WeightTarget], sums: Mapping[str, _Sums]) -> Iterator[None]:
    """Meanwhile only the targets have gradients; the squares of each are added, and it is freed."""
    asked = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]

    def add(target: WeightTarget, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            sums[target.parameter_name].add(target.layout.matrices(gradient))

    with ExitStack() as stack:
        for parameter, wanted, gradient in asked:
            stack.callback(setattr, parameter, "grad", gradient)
            stack.callback(parameter.requires_grad_, wanted)
            parameter.requires_grad_(False)
            parameter.grad = None
        for target in targets:
            target.parameter.requires_grad_(True)
            hook = target.parameter.register_post_accumulate_grad_hook(partial(add, target))  # type: ignore[no-untyped-call]
            stack.callback(hook.remove)
        yield
