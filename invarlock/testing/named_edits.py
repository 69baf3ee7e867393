"""Named, seeded edits of a model, in place: what a guard must leave alone, and what it must catch.

Those that know how a model is built are for Llamas; the others are for any architecture. ``benchmarks/judgement``
measures the guards that ship with them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.errors import UsageError, nearest, unknown
from invarlock.models.structure import Role
from invarlock.quantization import Plan, WeightTarget, find_weights, quantize_model
from invarlock.testing.llama import LAYER_DAMAGES, NEEDS_UNTIED, PRESERVING, ModelEdit, is_llama
from invarlock.testing.weights import ROW_DAMAGES, WEIGHT_DAMAGES, WeightDamage


@dataclass(frozen=True)
class Edit:
    """One edit: called with a model it changes it in place. What it is, is measured, not claimed."""

    name: str
    apply: ModelEdit
    module: str | None = None
    """The module that was damaged, where it is one."""
    untied: bool = False
    """It needs a baseline whose output head is not tied to the embedding."""

    def __call__(self, model: nn.Module) -> None:
        """Apply it; the seed is the name's."""
        with torch.no_grad():
            self.apply(model, torch.Generator().manual_seed(zlib.crc32(self.name.encode())))


def edits(model: nn.Module) -> Iterator[Edit]:
    """All named edits that fit a model; of a Llama also those of its parts, in layers chosen relative to its depth."""
    yield Edit("identity", lambda model, seed: None)
    yield from _precision()
    yield from _whole_model()
    if is_llama(model):
        for name, preserve in PRESERVING.items():
            yield Edit(name, preserve, untied=name in NEEDS_UNTIED)
        for name, damage in LAYER_DAMAGES.items():
            yield Edit(name, damage)
        yield from _projections(model)
    yield from _embeddings(model)


def damage(model: nn.Module, name: str, module: str | None = None) -> Edit:
    """A named edit for a model: one of ``edits``, or of ``WEIGHT_DAMAGES`` ("zeroed", "shuffled", "with one NaN", ...).

    :param module: whose weight is damaged, or the parameter's own name; by default the last feed-forward weight. The
        edit tells it as ``module``.
    :raises UsageError: there is no such edit, or no such module.
    """
    if name in WEIGHT_DAMAGES:
        target = _target(model, module) if module else _last_feed_forward(model)
        return _of_weight(f"{target.name} {name}", target, WEIGHT_DAMAGES[name])
    named = {edit.name: edit for edit in edits(model)}
    if name not in named:
        kind = f"edit of {type(model).__name__}"
        raise UsageError(f"damage: {unknown(kind, name, [*WEIGHT_DAMAGES, *named])}")
    if module:
        raise UsageError(f"damage: {name!r} is not of one module; of {module} there is {', '.join(WEIGHT_DAMAGES)}")
    return named[name]


def _target(model: nn.Module, name: str) -> WeightTarget:
    targets = {name: target for target in find_weights(model) for name in target.names}
    if name not in targets:
        raise UsageError(f"damage: {type(model).__name__} has no weight {name!r}{nearest(name, targets)}")
    return targets[name]


def _last_feed_forward(model: nn.Module) -> WeightTarget:
    found = [target for target in find_weights(model) if target.role is Role.FFN]
    if not found:
        raise UsageError(f"damage: {type(model).__name__} has no feed-forward weight; name a module")
    return found[-1]


def _of_weight(name: str, target: WeightTarget, damage: WeightDamage) -> Edit:
    return Edit(name, lambda model, seed: damage(model.get_parameter(target.parameter_name), seed), target.name)


# -- of the whole model ------------------------------------------------------------------------------------------------


def _precision() -> Iterator[Edit]:
    """The same function, or nearly."""
    yield _rtn("int8 channel", Plan(8, scope="all"))
    yield _rtn("int8 group 32", Plan(8, group_size=32, scope="all"))
    yield _rtn("int8 asymmetric", Plan(8, symmetric=False, scope="all"))
    yield _rtn("int8 clamped 0.001", Plan(8, clamp_ratio=0.001, scope="all"))
    yield _rtn("int6 channel", Plan(6, scope="all"))
    yield _rtn("int4 group 32", Plan(4, group_size=32, scope="all"))
    yield _rtn("int4 channel", Plan(4, scope="all"))
    for dtype in (torch.bfloat16, torch.float16):
        yield Edit(f"round trip {dtype}".replace("torch.", ""), _round_trip(dtype))
    for size in (1e-4, 1e-3):
        yield Edit(f"noise {size:g}", _noise(size))


def _whole_model() -> Iterator[Edit]:
    """Damage, and what may be."""
    yield _rtn("int3 channel", Plan(3, scope="all"))
    yield _rtn("int2 channel", Plan(2, scope="all"))
    yield _rtn("int2 group 32", Plan(2, group_size=32, scope="all"))
    yield _rtn("int4 tensor", Plan(4, per_channel=False, scope="all"))
    yield _rtn("int3 tensor", Plan(3, per_channel=False, scope="all"))
    for size in (0.1, 0.2, 0.5):
        yield Edit(f"noise {size:g}", _noise(size))
    for share in (0.3, 0.5, 0.7):
        yield Edit(f"pruned {share:.0%}", _prune(share))
    yield Edit("scales along the wrong axis", _wrong_axis)
    yield Edit("stale scales", _stale_scales)
    yield Edit("all projections scaled by 1.2", lambda model, seed: _each(model, lambda weight: weight.mul_(1.2)))


def _rtn(name: str, plan: Plan) -> Edit:
    return Edit(name, lambda model, seed: quantize_model(model, plan, measure=False))


def _each(model: nn.Module, change: Callable[[Tensor], Any]) -> None:
    """Change the weights of attention and feed-forward layers, each seen as (..., out, in)."""
    for target in find_weights(model):
        if target.role in (Role.ATTENTION, Role.FFN):
            change(target.layout.matrices(target.parameter))


def _round_trip(dtype: torch.dtype) -> ModelEdit:
    return lambda model, seed: [parameter.copy_(parameter.to(dtype)) for parameter in model.parameters()]


def _noise(size: float) -> ModelEdit:
    def apply(model: nn.Module, seed: torch.Generator) -> None:
        _each(model, lambda weight: weight.add_(torch.randn(weight.shape, generator=seed) * weight.std() * size))

    return apply


def _prune(share: float) -> ModelEdit:
    """By magnitude, within each row."""

    def prune(weight: Tensor) -> None:
        dropped = weight.abs().argsort(dim=-1)[..., : int(share * weight.shape[-1])]
        weight.scatter_(-1, dropped, 0.0)

    return lambda model, seed: _each(model, prune)


def _wrong_axis(model: nn.Module, seed: torch.Generator) -> None:
    """Codes of one scale a row, dequantized with scales in another order."""

    def damage(weight: Tensor) -> None:
        scale = _scale(weight)
        weight.div_(scale).round_().mul_(scale.roll(1, -2))

    _each(model, damage)


def _stale_scales(model: nn.Module, seed: torch.Generator) -> None:
    """Codes dequantized with the scales of another layer of the same shape."""
    kept: dict[torch.Size, Tensor] = {}

    def damage(weight: Tensor) -> None:
        scale = _scale(weight)
        other = kept.get(weight.shape, scale)
        kept[weight.shape] = scale
        weight.div_(scale).round_().mul_(other)

    _each(model, damage)


def _scale(weight: Tensor) -> Tensor:
    return weight.abs().amax(-1, keepdim=True) / 127.5


# -- of one weight -----------------------------------------------------------------------------------------------------


def _embeddings(model: nn.Module) -> Iterator[Edit]:
    """Damage to one row of ten of the input embedding."""
    for embedding in [target for target in find_weights(model) if target.role is Role.EMBEDDING][:1]:
        for name, damage in ROW_DAMAGES.items():
            yield _of_weight(f"embedding rows {name}", embedding, damage)


def _projections(model: Any) -> Iterator[Edit]:
    """Every damage to some projections of the first layer, the middle one and the last."""
    depth = len(model.model.layers)
    for layer in dict.fromkeys((0, depth // 2, depth - 1)):
        for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            target = _target(model, f"model.layers.{layer}.{part}")
            for name, damage in WEIGHT_DAMAGES.items():
                yield _of_weight(f"{part} of layer {layer} {name}", target, damage)
