"""Errors of single modules: each module with weights of its own is run alone on the baseline's inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.api import attached
from plugins_builtin.guards.activations import tensors_in
from plugins_builtin.guards.reconstruction.calls import CANNOT_RUN, Call, CallTap, Cut, Kept

TOKENS = 64
"""Number of the probe's tokens that are kept at every module."""


@dataclass(frozen=True, eq=False)
class Leaf:
    """A module with weights of its own, as the baseline called it."""

    call: Call
    outputs: tuple[Tensor, ...]
    stacks: Mapping[str, Tensor]
    """Every expert's matrix times one random vector, for each weight that stacks experts."""

    def error(self, module: nn.Module, *, is_head: bool) -> float:
        """The squared relative error of the edited module's output on the baseline's input, the mean over tokens.

        :param is_head: compare the features that both outputs have: logits of the tokens that both vocabularies have.
        """
        pairs = list(zip(_floats(self.call.run(module)), self.outputs, strict=True))
        if is_head:
            pairs = [(new[..., : old.shape[-1]], old[..., : new.shape[-1]]) for new, old in pairs]
        errors = [_squared_error(new, old) for new, old in pairs]
        return max(errors, default=0.0)

    def worst_expert(self, module: nn.Module) -> tuple[str, int] | None:
        """The parameter that stacks experts, and the expert in it, whose weights have changed most."""
        edited = _stacks(module)
        changes = {
            name: (edited[name] - old).square().sum(-1) / old.square().sum(-1).clamp(min=1e-30)
            for name, old in self.stacks.items()
        }
        name = max(changes, key=lambda key: float(changes[key].max()), default=None)
        return None if name is None or not changes[name].any() else (name, int(changes[name].argmax()))


@contextmanager
def observe_leaves(part: nn.Module) -> Iterator[dict[str, Leaf]]:
    """Record the calls of modules with weights of their own while a part runs, by path in the part."""
    leaves: dict[str, Leaf] = {}
    kept = Kept()

    def note(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        leading = next(tensors_in((args, kwargs)), None)
        if path in leaves or leading is None:
            return
        cut = Cut.of(leading, TOKENS)
        call = Call.of(module, args, kwargs, lambda tensor: kept.part(tensor, cut))
        outputs = tuple(kept.part(tensor, cut) for tensor in _floats(output))
        leaves[path] = Leaf(call, outputs, _stacks(module))

    owners = (path for path, module in part.named_modules() if next(module.parameters(recurse=False), None) is not None)
    with attached(part, {path: CallTap(partial(note, path)) for path in owners}):
        yield leaves


def leaf_errors(part: nn.Module, leaves: Mapping[str, Leaf], *, is_head: bool) -> dict[str, float]:
    """The error of each leaf of an edited part, by path; one that holds others counts only where they are sound."""
    errors: dict[str, float] = {}
    for path, leaf in leaves.items():
        try:
            errors[path] = leaf.error(part.get_submodule(path), is_head=is_head)
        except CANNOT_RUN:
            errors[path] = math.inf
    for path in errors:
        held = [errors[other] for other in errors if other != path and (not path or other.startswith(f"{path}."))]
        if any(error > 0 for error in held):
            errors[path] = 0.0
    return errors


def _floats(output: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]


def _squared_error(new: Tensor, old: Tensor) -> float:
    """The mean over tokens, so that one token of huge activations does not hide the others."""
    before = old.float().reshape(-1, old.shape[-1])
    difference = new.to(old.device).float().reshape(before.shape) - before
    squared = before.square().sum(-1)
    error = float((difference.square().sum(-1) / squared.clamp(min=1e-3 * float(squared.median()) + 1e-30)).mean())
    return error if math.isfinite(error) else math.inf


def _stacks(module: nn.Module) -> dict[str, Tensor]:
    """Each expert's matrix times a random vector: the squared length of a difference of two is, in expectation, the
    squared Frobenius norm of the difference of the matrices."""
    stacks = {}
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.ndim == 3:
            generator = torch.Generator().manual_seed(parameter.shape[2])
            direction = torch.randn(parameter.shape[2], generator=generator).to(parameter.device, parameter.dtype)
            stacks[name] = (parameter.detach() @ direction).float()
    return stacks
