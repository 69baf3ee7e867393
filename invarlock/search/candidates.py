"""Candidates of a search: the schemes that weights may get, and what each costs in bits and in loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from invarlock.core.progress import counted
from invarlock.quantization.partners import partners_of
from invarlock.quantization.rounding import Workspace, fake_quantize_
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import PlannedWeight, WeightTarget
from invarlock.search.fisher import Curvature

BITS = range(2, 9)
GROUPS = (32, 64, 128)
"""Sizes that engines have kernels for."""
ROWS = 192
"""Of a matrix that candidates are tried on; the error of a prediction, a quarter, is far above that of the sample."""

Holds = Callable[[Scheme, Sequence[WeightTarget]], bool]
"""True if the format of the output can hold some weights in a scheme."""


@dataclass(frozen=True)
class Choice:
    """A scheme of a decision."""

    scheme: Scheme
    bits: int
    """Of all its weights, scales included."""
    rise: float
    """Predicted, of the loss, in nats per token."""


@dataclass(frozen=True)
class Decision:
    """Weights that get the same scheme, and the schemes that they may get."""

    names: tuple[str, ...]
    """As rules match them."""
    weights: int
    choices: tuple[Choice, ...]


def decisions(
    targets: Sequence[WeightTarget],
    base: Scheme,
    curvatures: Mapping[str, Curvature],
    *,
    fuse: bool = True,
    holds: Holds = lambda scheme, targets: True,
) -> list[Decision]:
    """The decisions of a search, in the order of the model; none for weights that no scheme can hold.

    :param base: all that is not searched of the schemes; with a size of groups that is not searched either.
    :param curvatures: by the name of the parameter.
    :param fuse: whether weights that engines fuse share a scheme.
    """
    sets = partners_of(targets) if fuse else [(target,) for target in targets]
    found = []
    for together in counted(sets):
        held = [scheme for scheme in schemes_for(base, together) if holds(scheme, together)]
        if held:
            found.append(_decision(together, held, curvatures))
    return found


def schemes_for(base: Scheme, together: Sequence[WeightTarget]) -> list[Scheme]:
    """The schemes to try for weights that share one.

    Groups are whole, which formats and kernels need; where no size is that, whole channels share a scale.
    """
    columns = [target.layout.matrices(target.parameter).shape[-1] for target in together]
    whole = [size for size in GROUPS if base.per_channel and all(count % size == 0 for count in columns)]
    sizes: Sequence[int | None] = [base.group_size] if base.group_size else whole or [None]
    return [dataclasses.replace(base, bitwidth=bits, group_size=size) for bits in BITS for size in sizes]


def _decision(
    together: Sequence[WeightTarget], tried: Sequence[Scheme], curvatures: Mapping[str, Curvature]
) -> Decision:
    samples = [Sample.of(target, curvatures[target.parameter_name]) for target in together]
    choices = [
        Choice(
            scheme,
            sum(PlannedWeight(target, scheme).bits for target in together),
            sum(sample.rise(scheme) for sample in samples),
        )
        for scheme in tried
    ]
    weights = sum(target.parameter.numel() for target in together)
    return Decision(tuple(target.name for target in together), weights, tuple(choices))


@dataclass(frozen=True)
class Sample:
    """Rows of a weight at equal distances, which schemes are tried on; one that is on disk is read once for all."""

    rows: Tensor
    """(..., some of out, in), in memory of their own."""
    curvature: Curvature
    """At these rows."""
    share: float
    """In the curvature of all rows."""

    @classmethod
    @torch.no_grad()
    def of(cls, target: WeightTarget, curvature: Curvature) -> Sample:
        matrices = target.layout.matrices(target.parameter)
        # Odd, so that rows are not all of the same places in attention heads, whose sizes are powers of two.
        step = matrices.shape[-2] // ROWS | 1
        rows = matrices[..., ::step, :].clone(memory_format=torch.contiguous_format)
        sampled = Curvature(curvature.rows[..., ::step], curvature.columns)
        return cls(rows, sampled, float(sampled.rows.sum() / curvature.rows.sum().clamp(min=1e-30)))

    @torch.no_grad()
    def rise(self, scheme: Scheme) -> float:
        """The predicted rise of the loss, nats per token, from rounding all rows."""
        after = self.rows.clone()
        columns = self.curvature.columns if scheme.scale != "largest" else None
        fake_quantize_(after, scheme, measure=False, workspace=Workspace(), columns=columns)
        return self.curvature.rise(after.float() - self.rows.float()) / max(self.share, 1e-6)


def predicted_rise(target: WeightTarget, scheme: Scheme, curvature: Curvature) -> float:
    """The predicted rise of the loss, nats per token, from rounding a weight."""
    return Sample.of(target, curvature).rise(scheme)
