"""A small, seeded sample of the tokens that pass through a module: the same tokens before and after an edit.

It is uniform over the tokens of the first ``CALLS`` calls, each of one batch of windows: every token draws a random
key, and those with the smallest keys are kept (reservoir sampling by keys; Efraimidis and Spirakis 2006, with equal
weights). The keys depend on the seed and on the numbers of tokens in the calls so far, so two passes over the same
windows keep the same tokens, and so do all samples of a pass. Memory does not grow with the number of windows, and
neither does the time: some dozens of tokens tell no more for coming from more windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

CALLS = 2

Kind = Literal["inputs", "outputs"]


@dataclass(frozen=True, eq=False)
class Sampled:
    """The sample of one pass."""

    rows: Tensor
    """(tokens, features), as the model computed them and where."""
    calls: int
    tokens: int
    """Number of all tokens that passed, sampled or not."""

    @cached_property
    def finite(self) -> bool:
        return bool(are_finite(self.rows))

    def comparable(self, other: Sampled) -> bool:
        """Whether both are of the same tokens, with the same features."""
        return (self.rows.shape, self.calls, self.tokens) == (other.rows.shape, other.calls, other.tokens)


class Sample:
    """Collects ``size`` tokens of what passes, call by call."""

    def __init__(self, size: int, seed: int) -> None:
        self._draw = _start(size, seed)
        self._rows: Tensor | None = None
        self._calls = self._tokens = 0

    def add(self, activations: Tensor) -> None:
        """Let the activations of one call pass: (..., features)."""
        rows = activations.detach().reshape(-1, activations.shape[-1])
        self._calls += 1
        self._tokens += len(rows)
        if self._calls > CALLS:
            return
        self._draw = _after(self._draw, len(rows))
        taken = rows.index_select(0, self._draw.take.to(rows.device))
        if self._rows is None:
            self._rows = taken
        else:
            self._rows = torch.cat([self._rows.index_select(0, self._draw.keep.to(rows.device)), taken])

    def result(self) -> Sampled | None:
        """The sample; None where nothing passed."""
        return None if self._rows is None else Sampled(self._rows, self._calls, self._tokens)


@dataclass(frozen=True, eq=False)
class Seen:
    """Samples of one tap in one pass; None where no tensor of the kind passed."""

    inputs: Sampled | None
    outputs: Sampled | None
    all_finite: bool
    """Whether all that went in was finite, sampled or not; True if that was not looked at."""
    order: int
    """The place of the module's first call among those of the taps that share a counter; -1 if it was not called."""


class SamplingTap:
    """Samples what goes into a module and what comes out of it: the first floating tensor of each, the same tokens.

    :param tokens: number of tokens to keep.
    :param order: a counter that the taps of a pass share.
    :param budget: largest number of values to keep of either; with many features fewer tokens are kept, down to 8.
    :param outputs: whether to sample what comes out, too.
    :param thorough: whether to look for NaN and infinity in all that goes in.
    """

    def __init__(
        self,
        tokens: int,
        seed: int,
        order: Iterator[int],
        *,
        budget: int = 1 << 20,
        outputs: bool = False,
        thorough: bool = False,
    ) -> None:
        self._tokens, self._seed, self._budget, self._order = tokens, seed, budget, order
        self._wants_outputs, self._thorough = outputs, thorough
        self._placed = -1
        self._inputs: Sample | None = None
        self._outputs: Sample | None = None
        self._finite: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        entering = _first_tensor((args, kwargs))
        leaving = _first_tensor(output) if self._wants_outputs else None
        if self._placed < 0:
            self._placed = next(self._order)
            widest = max((tensor.shape[-1] for tensor in (entering, leaving) if tensor is not None), default=1)
            size = min(self._tokens, max(8, self._budget // widest))
            self._inputs, self._outputs = Sample(size, self._seed), Sample(size, self._seed)
        if leaving is not None and self._outputs:
            self._outputs.add(leaving)
        if entering is not None and self._inputs:
            self._inputs.add(entering)
            if self._thorough:
                finite = are_finite(entering)
                self._finite = finite if self._finite is None else self._finite & finite

    def result(self) -> Seen:
        return Seen(
            self._inputs.result() if self._inputs else None,
            self._outputs.result() if self._outputs else None,
            self._finite is None or bool(self._finite),
            self._placed,
        )


@dataclass(frozen=True)
class Place:
    """A module that is sampled."""

    name: str
    family: str
    blamed: str
    """The module that is suspected where the samples differ."""
    is_head: bool = False


@dataclass(frozen=True, eq=False)
class SeenPlace:
    """A place in both passes."""

    place: Place
    before: Seen
    after: Seen
    compared: Kind

    @property
    def broken(self) -> bool:
        """NaN or Inf came into the samples with the edit."""
        before, after = self._samples(self.compared)
        return bool(before and after and before.finite and not after.finite)

    @property
    def harmed(self) -> bool:
        """NaN or Inf came with the edit, into the samples or into what was looked at besides."""
        return self.broken or (self.before.all_finite and not self.after.all_finite)

    def rows(self, kind: Kind) -> tuple[Tensor, Tensor] | None:
        """Samples in float32; None unless both are finite, and of the same tokens with the same features."""
        before, after = self._samples(kind)
        if before and after and before.comparable(after) and before.finite and after.finite:
            return before.rows.float(), after.rows.float()
        return None

    def _samples(self, kind: Kind) -> tuple[Sampled | None, Sampled | None]:
        return getattr(self.before, kind), getattr(self.after, kind)


def seen_places(context: Mapping[str, Any], places: Mapping[str, Place], compared: Kind) -> list[SeenPlace]:
    """Places at which something was sampled, in the order in which the edited model calls them."""
    before, after = (context.get("observations", {}).get(side, {}) for side in ("baseline", "edited"))
    both = [
        SeenPlace(places[name], before[name], seen, compared)
        for name, seen in after.items()
        if name in before and getattr(seen, compared)
    ]
    return sorted(both, key=lambda seen: seen.after.order)


@dataclass(frozen=True, eq=False)
class _Draw:
    """Tokens in a sample after some calls."""

    size: int
    seed: int
    keys: Tensor
    keep: Tensor
    """Places in the sample before the last call of what stays in it."""
    take: Tensor
    """Places in the last call of what comes into it."""
    calls: int = 0


@lru_cache(maxsize=64)
def _start(size: int, seed: int) -> _Draw:
    nothing = torch.empty(0, dtype=torch.long)
    return _Draw(size, seed, torch.empty(0, dtype=torch.float64), nothing, nothing)


# All samples of a pass draw alike, one after the other, so a few entries serve them all.
@lru_cache(maxsize=64)
def _after(draw: _Draw, tokens: int) -> _Draw:
    generator = torch.Generator().manual_seed(draw.seed * 1_000_003 + draw.calls)
    keys = torch.cat([draw.keys, torch.rand(tokens, generator=generator, dtype=torch.float64)])
    kept = keys.topk(min(draw.size, len(keys)), largest=False).indices.sort().values
    keep, take = kept[kept < len(draw.keys)], kept[kept >= len(draw.keys)] - len(draw.keys)
    return _Draw(draw.size, draw.seed, keys[kept], keep, take, draw.calls + 1)


def are_finite(tensor: Tensor) -> Tensor:
    """One boolean of all numbers: the extremes tell in a thirtieth of the time of ``isfinite``, without a temporary."""
    return torch.stack(torch.aminmax(tensor.detach())).isfinite().all()


def _first_tensor(value: Any) -> Tensor | None:
    return next((tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.numel()), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of nested tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)
