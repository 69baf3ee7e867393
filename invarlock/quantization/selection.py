"""The weights of a model, their layouts, and those that a plan selects."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from invarlock.core.errors import nearest
from invarlock.distributed.dtensor import local
from invarlock.models.structure import Role, is_conv1d, is_experts, is_router, role_of
from invarlock.quantization.layout import WeightLayout
from invarlock.quantization.rules import AnyPlan, Rule, Rules
from invarlock.quantization.scheme import Plan, PlanError, Scheme, matches

SCOPE_ROLES = {"ffn": {Role.FFN}, "attn": {Role.ATTENTION}, "all": {Role.FFN, Role.ATTENTION}}


@dataclass(frozen=True, eq=False)
class WeightTarget:
    """A weight of a model. One that several modules share is one target, under the name that comes first."""

    name: str
    """The path of the module, if the weight is its ``weight``; otherwise that of the parameter."""
    parameter_name: str
    """The path of the parameter, as in a state dict."""
    module: nn.Module
    parameter: Tensor
    role: Role
    layout: WeightLayout
    names: tuple[str, ...]
    """Every name that patterns are matched against: of the module and of the parameter, wherever it is tied in."""

    @property
    def matrix_shape(self) -> torch.Size:
        """(..., out, in), without reading the weight."""
        return self.layout.matrices(torch.empty(self.parameter.shape, device="meta")).shape


@dataclass(frozen=True, eq=False)
class PlannedWeight:
    """A weight that a plan rounds, and the scheme that it has for it."""

    target: WeightTarget
    scheme: Scheme
    columns: Tensor | None = None
    """How much the loss depends on each input, where scales go by it."""

    @property
    def bits(self) -> int:
        """The bits that it takes, scales included."""
        return self.bits_of(self.target, self.scheme)

    @staticmethod
    def bits_of(target: WeightTarget, scheme: Scheme | None) -> int:
        """The bits that a weight takes, scales included; None leaves it as it is."""
        weights = target.parameter.numel()
        if scheme is None:
            return weights * 8 * target.parameter.element_size()
        columns = target.matrix_shape[-1]
        groups = math.ceil(columns / scheme.group_size) if scheme.group_size else 1
        scales = weights // columns * groups if scheme.per_channel else 1
        zero_points = 0 if scheme.symmetric else scheme.bitwidth
        return weights * scheme.bitwidth + scales * (scheme.scale_bits + zero_points)


def find_weights(model: nn.Module) -> list[WeightTarget]:
    """Every weight that RTN could round, in the order of the model, each once.

    These are the weights of Linear, Conv1D (GPT-2), Conv1d to Conv3d, Embedding, MultiheadAttention and routers, and
    the three-dimensional ones of fused experts. A weight tied to an embedding or to the output head has that role.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[object, WeightTarget] = {}
    for path, module in modules.items():
        for key, parameter in module.named_parameters(recurse=False):
            layout = _layout(module, key, parameter, model)
            if layout is None:
                continue
            parameter_name = f"{path}.{key}".lstrip(".")
            name = path if path and key == "weight" else parameter_name
            role = role_of(model, modules, path, parameter)
            target = WeightTarget(name, parameter_name, module, parameter, role, layout, (name, parameter_name))
            identity = _identity(parameter)
            found[identity] = _tied(found[identity], target) if identity in found else target
    return list(found.values())


def select_targets(model: nn.Module, plan: AnyPlan) -> list[WeightTarget]:
    """The weights that a plan touches, in the order of the model, each once.

    :raises PlanError: as ``planned_weights``.
    """
    return [planned.target for planned in planned_weights(model, plan)]


def planned_weights(model: nn.Module, plan: AnyPlan) -> list[PlannedWeight]:
    """The weights that a plan touches, each with its scheme, in the order of the model.

    :raises PlanError: a pattern matches no weight of the model, the scope leaves nothing of what one is to include,
        earlier rules hide a rule, or the plan selects none.
    """
    weights = find_weights(model)
    if isinstance(plan, Rules):
        return _by_rules(weights, plan)
    return [PlannedWeight(target, plan) for target in _by_scope(weights, plan)]


def _by_rules(weights: Sequence[WeightTarget], plan: Rules) -> list[PlannedWeight]:
    decided: dict[str, int] = {}
    for number, rule in enumerate(plan.rules):
        wanted = _wanted_by(rule, f"[{number}].match", weights)
        new = [target for target in wanted if target.parameter_name not in decided]
        if not new:
            raise PlanError(_hidden(number, sorted({decided[target.parameter_name] for target in wanted})))
        decided |= dict.fromkeys((target.parameter_name for target in new), number)
    if not plan.schemes:
        raise PlanError("`[0].keep` is true, as it is of all rules, so no weight is rounded; add a rule that rounds")
    of_weights = ((target, decided.get(target.parameter_name)) for target in weights)
    rules = [(target, plan.rules[number]) for target, number in of_weights if number is not None]
    return [PlannedWeight(target, rule) for target, rule in rules if not rule.keep]


def _wanted_by(rule: Rule, key: str, weights: Sequence[WeightTarget]) -> list[WeightTarget]:
    """The weights that a rule is for, whatever other rules say."""
    wanted: dict[str, WeightTarget] = {}
    for pattern in rule.match:
        matched = _matched(key, pattern, weights)
        # A pattern as wide as * is not meant for what is only ever named.
        of_blocks = [target for target in matched if target.role in SCOPE_ROLES["all"]]
        wanted |= {target.parameter_name: target for target in of_blocks or matched}
    return list(wanted.values())


def _hidden(number: int, by: Sequence[int]) -> str:
    earlier = " and ".join(f"`[{other}].match`" for other in by)
    return f"`[{number}].match` decides nothing: {earlier} matches all of it first; move the rule up, or remove it"


def _by_scope(weights: Sequence[WeightTarget], plan: Plan) -> list[WeightTarget]:
    for pattern in plan.include:
        matched = _matched("include", pattern, weights)
        if not any(_may_be_included(target, plan.scope) for target in matched):
            raise PlanError(
                f"`include` holds {pattern!r}, which matches only weights outside of `scope` {plan.scope!r} "
                f"(as {matched[0].name}, {matched[0].role}); set `scope` to 'all', or remove the pattern"
            )
    for pattern in plan.exclude:
        _matched("exclude", pattern, weights)
    chosen = [target for target in weights if _is_wanted(target, plan)]
    if not chosen:
        raise PlanError(_nothing_selected(plan, weights))
    return chosen[: plan.max_modules]


def _is_wanted(target: WeightTarget, plan: Plan) -> bool:
    if _matches_any(plan.exclude, target):
        return False
    if not plan.include:
        return target.role in SCOPE_ROLES[plan.scope]
    return _matches_any(plan.include, target) and _may_be_included(target, plan.scope)


def _may_be_included(target: WeightTarget, scope: str) -> bool:
    # What is of no scope, such as an embedding, is only ever named.
    return target.role in SCOPE_ROLES[scope] or target.role not in SCOPE_ROLES["all"]


def _matches_any(patterns: Sequence[str], target: WeightTarget) -> bool:
    return any(matches(pattern, name) for pattern in patterns for name in target.names)


def _matched(key: str, pattern: str, weights: Sequence[WeightTarget]) -> list[WeightTarget]:
    if found := [target for target in weights if _matches_any((pattern,), target)]:
        return found
    names = [name for target in weights for name in target.names]
    last_parts = {name.rpartition(".")[2] for name in names}
    hint = nearest(pattern, names) or nearest(pattern.rpartition(".")[2], last_parts)
    raise PlanError(f"`{key}` holds {pattern!r}, which matches no weight of the model{hint}")


def _nothing_selected(plan: Plan, weights: Sequence[WeightTarget]) -> str:
    counts = Counter(target.role for target in weights)
    examples = {target.role: target.name for target in reversed(weights)}
    there_is = ", ".join(f"{counts[role]} {role} (as {examples[role]})" for role in Role if role in counts)
    filters = "".join(f", `{key}` {list(getattr(plan, key))}" for key in ("include", "exclude") if getattr(plan, key))
    return (
        f"`scope` {plan.scope!r}{filters} selects no weight; the model has {there_is or 'none at all'}; "
        "change `scope`, or name weights in `include`"
    )


def _tied(first: WeightTarget, other: WeightTarget) -> WeightTarget:
    tie_roles = (Role.EMBEDDING, Role.HEAD)
    role = other.role if first.role not in tie_roles and other.role in tie_roles else first.role
    return replace(first, role=role, names=first.names + other.names)


def _identity(parameter: Tensor) -> object:
    """Equal for parameters that share their memory, whether or not they are the same object."""
    address = local(parameter).data_ptr() if parameter.device.type != "meta" else 0
    return (parameter.device, address) if address else id(parameter)


def _layout(module: nn.Module, key: str, parameter: Tensor, model: nn.Module) -> WeightLayout | None:
    """WeightLayout of a parameter, or None where there is nothing to round: a bias, a norm, an unknown module."""
    if parameter.ndim == 3 and is_experts(module):
        return WeightLayout.IN_OUT if _is_transposed(module, model) else WeightLayout.OUT_IN
    if isinstance(module, nn.MultiheadAttention):
        return WeightLayout.OUT_IN if parameter.ndim == 2 and key.endswith("_weight") else None
    if key != "weight" or parameter.ndim < 2:
        return None
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return WeightLayout.CONV
    if is_conv1d(module):
        return WeightLayout.IN_OUT
    if isinstance(module, nn.Linear | nn.Embedding) or is_router(module):
        return WeightLayout.OUT_IN
    return None


def _is_transposed(experts: nn.Module, model: nn.Module) -> bool:
    """Tell fused experts that are stored (expert, in, out) from others.

    Transformers say so on the module. Where they do not, the first weight of the experts shows it: it takes in the
    hidden state, whose size is known.
    """
    stated = getattr(experts, "is_transposed", None)
    if stated is not None:
        return bool(stated)
    sizes = (getattr(experts, name, None) for name in ("input_size", "hidden_size", "hidden_dim"))
    hidden = next((size for size in sizes if size), getattr(getattr(model, "config", None), "hidden_size", None))
    first = next(candidate for candidate in experts.parameters() if candidate.ndim == 3)
    return first.shape[-2] == hidden and first.shape[-1] != hidden
