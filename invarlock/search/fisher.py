"""The diagonal of the Fisher information: how much a small change of each weight raises the loss.

With labels drawn from the model itself the gradient is zero on average, so the rise of the loss is of second order. Its
curvature is then the Fisher information, whose diagonal is the mean of the squared gradients (Kunstner et al. 2019,
"Limitations of the empirical Fisher approximation": labels of the text in place of drawn ones would not give it).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.progress import counted
from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.evaluation.passes import predicted_tokens, uncached_logits
from invarlock.models.facts import Predicted, evaluating
from invarlock.quantization.selection import WeightTarget


@dataclass(frozen=True)
class Fisher:
    """The diagonal, per scored token, of some weights by the name of the parameter: float32, shaped as the weight."""

    diagonal: Mapping[str, Tensor]

    def rise(self, parameter_name: str, before: Tensor, after: Tensor) -> float:
        """The predicted rise of the loss, nats per token, from a change of one weight."""
        change = after.float() - before.float()
        return 0.5 * float(change.square_().mul_(self.diagonal[parameter_name]).sum())


def fisher_of(
    model: nn.Module, windows: Windows, targets: Sequence[WeightTarget], *, task: Predicted, seed: int
) -> Fisher:
    """The Fisher diagonal of some weights, from one run of each window forward and back.

    Labels of one window are drawn independently of each other, so that the square of the sum of their gradients has the
    sum of their squares for a mean. Each gradient is squared and freed as soon as it is there.

    :param windows: of text that the verdict does not rest on.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {target.parameter_name: torch.zeros_like(target.parameter, dtype=torch.float32) for target in targets}
    tokens = 0
    with evaluating(model), _squared_into(model, targets, sums), torch.enable_grad():
        for window in counted([*windows.batches(1)]):
            scored = predicted_tokens(window, task) != UNSCORED
            logits = uncached_logits(model, window)[scored].float()
            drawn = _drawn(logits.detach(), generator)
            functional.cross_entropy(logits, drawn, reduction="sum").backward()
            tokens += len(drawn)
    return Fisher({name: total.div_(max(tokens, 1)) for name, total in sums.items()})


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of logits, drawn by its probability."""
    # The largest of probabilities over exponential numbers; on the CPU, so that a seed draws the same on every device.
    noise = torch.empty(logits.shape).exponential_(generator=generator).log_().to(logits.device)
    return logits.log_softmax(-1).sub_(noise).argmax(-1)


@contextmanager
def _squared_into(model: nn.Module, targets: Sequence[WeightTarget], sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Meanwhile only the targets have gradients; the squares of each are added, and it is freed."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}

    def add_square(parameter: Tensor, total: Tensor) -> None:
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad.float(), None
            total.addcmul_(gradient, gradient)

    hooks = []
    try:
        model.requires_grad_(False)
        for target in targets:
            total = sums[target.parameter_name]
            target.parameter.requires_grad_(True)
            hooks.append(
                target.parameter.register_post_accumulate_grad_hook(lambda each, total=total: add_square(each, total))
            )
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
