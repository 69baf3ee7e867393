"""From the configuration to the plan of each attempt."""

from __future__ import annotations

import dataclasses

from invarlock.config.schema import PlanConfig, RunConfig
from invarlock.quantization.scheme import Plan, Scheme


def plans_of(config: RunConfig) -> list[Plan]:
    """The plan of each attempt: after a rollback one more bit, up to 8."""
    plan = config.edit.plan
    widths = range(plan.bitwidth, min(8, plan.bitwidth + config.edit.retry.max_attempts - 1) + 1)
    half_scales = config.output.save_model and config.output.format == "gguf"
    return [_plan(dataclasses.replace(plan, bitwidth=width), half_scales) for width in widths]


def _plan(plan: PlanConfig, half_scales: bool) -> Plan:
    return Plan(
        Scheme(plan.bitwidth, plan.symmetric, plan.per_channel, plan.group_size, plan.clamp_ratio, half_scales),
        scope=plan.scope,
        include=plan.include,
        exclude=plan.exclude,
        max_modules=plan.max_modules,
    )
