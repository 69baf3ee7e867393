"""Weights that inference engines fuse, and which therefore share a scheme."""

from __future__ import annotations

import re
from collections.abc import Sequence

from invarlock.models.structure import is_experts
from invarlock.quantization.selection import WeightTarget

FUSED = (
    {"q_proj", "k_proj", "v_proj"},
    {"query", "key", "value"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
    {"gate_proj", "up_proj"},
    {"w1", "w3"},
)
"""Names of modules of one parent, as ``packed_modules_mapping`` of vLLM's models has them."""
EXPERT = re.compile(r"(.*\bexperts)\.\d+\.")


def partners_of(targets: Sequence[WeightTarget]) -> list[tuple[WeightTarget, ...]]:
    """The targets in the order of the model, those that are fused together: q/k/v, gate/up, the experts of a layer."""
    sets: dict[str, list[WeightTarget]] = {}
    for target in targets:
        sets.setdefault(fused_name(target), []).append(target)
    return [tuple(members) for members in sets.values()]


def fused_name(target: WeightTarget) -> str:
    """Equal for partners."""
    if of_expert := EXPERT.match(target.name):
        return of_expert[1]
    parent, _, name = target.name.rpartition(".")
    if is_experts(target.module):
        return parent
    together = next((names for names in FUSED if name in names), {name})
    return f"{parent}.{min(together)}"
