"""Suspects: the damaged weights in the parts that cost most."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from invarlock.api import evaluating
from plugins_builtin.guards.figures import Suspect
from plugins_builtin.guards.reconstruction.errors import PartError, PartJudgement, Reference
from plugins_builtin.guards.reconstruction.leaves import leaf_errors

NOISE = 1e-6
"""Nats below which a part is not suspected: rounding of half precision costs more, that of float32 less."""


def find_suspects(reference: Reference, judgement: PartJudgement, model: nn.Module, most: int) -> list[Suspect]:
    """The modules most likely damaged, best first, out of the ``most`` costliest parts.

    The nats of a part are shared out among the modules in it by their squared errors.
    """
    costly = sorted((error for error in judgement.errors if error.nats > NOISE), key=lambda error: -error.nats)
    names = _first_names(model)
    found: dict[str, Suspect] = {}
    with evaluating(model):
        for error in costly[:most]:
            share = error.nats / judgement.score if math.isfinite(error.nats) else 1.0
            cost = error.failure or f"{share:.0%} of the score"
            for suspect in _of_part(reference, error, model, cost, judgement.rotated):
                name = names.get(suspect.module, suspect.module)
                before = found.get(name, replace(suspect, module=name, score=0.0))
                found[name] = replace(before, score=before.score + suspect.score)
    return sorted(found.values(), key=lambda suspect: -suspect.score)[:most]


def _of_part(reference: Reference, error: PartError, model: nn.Module, cost: str, rotated: bool) -> Iterator[Suspect]:
    # In rotated hidden states no module of the baseline has its counterpart, though whole parts have.
    squared = {} if rotated else _leaf_errors(reference, error, model)
    worst = max(squared.values(), default=0.0)
    if worst == 0:
        unlocated = f"relative error of its output {error.relative:.3g}, due to no single weight; {cost}"
        yield Suspect(error.name, error.nats, error.failure or unlocated)
        return
    # One infinite error is the cause of all others, and infinity has no shares.
    shares = {key: float(math.isinf(value)) if math.isinf(worst) else value for key, value in squared.items()}
    for (part, path), value in squared.items():
        if shares[part, path]:
            name, which = _named(reference, model, part, path)
            off = "is not finite" if math.isinf(value) else f"has a relative error of {math.sqrt(value):.3g}"
            evidence = f"alone on the baseline's input, its output{which} {off}; {error.name}: {cost}"
            yield Suspect(name, error.nats * shares[part, path] / sum(shares.values()), evidence)


def _leaf_errors(reference: Reference, error: PartError, model: nn.Module) -> dict[tuple[str, str], float]:
    """Squared errors by part and path in it; the parts after the last block share one cost."""
    members = reference.tail if error.name == reference.head else (error.name,)
    found: dict[tuple[str, str], float] = {}
    for name in members:
        part = reference.parts[name]
        try:
            module = model.get_submodule(name)
        except AttributeError:  # It has gone, and that is the failure.
            continue
        for path, value in leaf_errors(module, part.leaves, is_head=name == reference.head).items():
            rows = part.rows.get(path)
            found[name, path] = max(value, rows.expected_error(module)) if rows else value
    return found


def _named(reference: Reference, model: nn.Module, part: str, path: str) -> tuple[str, str]:
    """The name of a leaf, and where it stacks experts the one that has changed."""
    name = f"{part}.{path}".rstrip(".")
    worst = reference.parts[part].leaves[path].worst_expert(model.get_submodule(name))
    return (name, "") if worst is None else (f"{name}.{worst[0]}", f" with expert {worst[1]}")


def _first_names(model: nn.Module) -> dict[str, str]:
    """For a module that shares its weight with one before it, the name of that one: tied weights go by one name."""
    owners: dict[int, str] = {}
    weights = {path: getattr(module, "weight", None) for path, module in model.named_modules()}
    return {path: owners.setdefault(id(weight), path) for path, weight in weights.items() if weight is not None}
