"""A small, seeded sample of the tokens that pass through a module: the same tokens before and after an edit.

It is uniform over the tokens of the first ``CALLS`` calls, each of one batch of windows: every token draws a random
key, and those with the smallest keys are kept (reservoir sampling by keys; Efraimidis and Spirakis 2006, with equal
weights). The keys depend on the seed and on the numbers of tokens in the calls so far, so two passes over the same
windows keep the same tokens, and so do all samples of a pass. Memory does not grow with the number of windows, and
neither does the time: some dozens of tokens tell no more for coming from more windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, Literal

import torch
from torch import Tensor, nn

from plugins_builtin.guards.on_host import on_host

CALLS = 2
SPREAD = 4
"""Positions among which one is sampled, at least: neighbours in a text are alike."""

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
        """Compare the tokens that both are of, and their features."""
        return (self.rows.shape, self.calls, self.tokens) == (other.rows.shape, other.calls, other.tokens)

    def first(self, features: int) -> Sampled:
        """The sample of the first features alone."""
        return self if features == self.rows.shape[1] else replace(self, rows=self.rows[:, :features])


class Sample:
    """Collects ``size`` tokens of what passes, call by call."""

    def __init__(self, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._rows: Tensor | None = None
        self._calls = self._tokens = 0
        self._sampled_calls: tuple[int, ...] = ()

    def add(self, activations: Tensor) -> None:
        """Let the activations of one call pass: (..., features)."""
        rows = activations.detach().reshape(-1, activations.shape[-1])
        self._calls += 1
        self._tokens += len(rows)
        if self._calls > CALLS:
            return
        self._sampled_calls = (*self._sampled_calls, len(rows))
        stay, come = _draw(self._size, self._seed, self._sampled_calls, rows.device)
        taken = rows.index_select(0, come)
        self._rows = taken if self._rows is None else torch.cat([self._rows.index_select(0, stay), taken])

    def result(self) -> Sampled | None:
        """The sample; None where nothing passed."""
        return None if self._rows is None else Sampled(self._rows, self._calls, self._tokens)


# All samples of a pass draw alike, so a few entries serve them all.
@lru_cache(maxsize=64)
def _draw(size: int, seed: int, calls: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of what is in a sample after calls of so many tokens: in the sample before the last call, and in that."""
    keys = torch.cat(
        [
            torch.rand(tokens, generator=torch.Generator().manual_seed(seed * 1_000_003 + call), dtype=torch.float64)
            for call, tokens in enumerate(calls)
        ]
    )
    earlier = sum(calls[:-1])
    before, after = (_smallest(some, size) for some in (keys[:earlier], keys))
    stay, come = torch.isin(before, after).nonzero().flatten(), after[after >= earlier] - earlier
    return stay.to(device), come.to(device)


def _smallest(keys: Tensor, count: int) -> Tensor:
    return keys.topk(min(count, len(keys)), largest=False).indices.sort().values


@dataclass(frozen=True, eq=False)
class Seen:
    """Samples of one tap in one pass."""

    samples: Mapping[Kind, Sampled | None]
    """None, or no entry, where no tensor of the kind passed."""
    all_finite: bool
    """False if anything that went in was not finite, sampled or not; True if that was not looked at."""
    order: int
    """The place of the module's first call among those of the taps that share a counter; -1 if it was not called."""

    @classmethod
    def of(cls, result: Mapping[str, Any]) -> Seen:
        """Of the result of a tap, or of one that was kept."""
        samples = {kind: Sampled(**sample) if sample else None for kind, sample in result["samples"].items()}
        return cls(samples, result["all_finite"], result["order"])


@dataclass(eq=False)
class SamplingTap:
    """Samples what goes into a module and what comes out of it: the first floating tensor of each, the same tokens."""

    tokens: int
    """Number of tokens to keep."""
    seed: int
    order: Iterator[int]
    """A counter that the taps of a pass share."""
    budget: int
    """Largest number of values to keep of either; with many features fewer tokens are kept, down to 8."""
    outputs: bool
    """True to sample what comes out, too."""
    thorough: bool
    """True to look for NaN and infinity in all that goes in."""

    def __post_init__(self) -> None:
        self._placed = -1
        self._samples: dict[Kind, Sample] = {}
        self._finite = torch.tensor(True)

    @property
    def positions(self) -> int:
        """Positions of the first windows that suffice."""
        return SPREAD * self.tokens

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        entering = _first_tensor((args, kwargs))
        leaving = _first_tensor(output) if self.outputs else None
        if self._placed < 0:
            self._placed = next(self.order)
            widest = max((tensor.shape[-1] for tensor in (entering, leaving) if tensor is not None), default=1)
            size = min(self.tokens, max(8, self.budget // widest))
            self._samples = {"inputs": Sample(size, self.seed), "outputs": Sample(size, self.seed)}
        if leaving is not None:
            self._samples["outputs"].add(leaving)
        if entering is not None:
            self._samples["inputs"].add(entering)
            if self.thorough:
                self._finite = self._finite & are_finite(entering)

    def result(self) -> dict[str, Any]:
        """The samples as plain data, which a reference can hold: ``Seen.of`` reads it."""
        samples = {kind: sample.result() for kind, sample in self._samples.items()}
        plain = {
            kind: found and {each.name: getattr(found, each.name) for each in fields(found)}
            for kind, found in samples.items()
        }
        return {"samples": plain, "all_finite": bool(self._finite), "order": self._placed}


@dataclass(frozen=True)
class Place:
    """A module that is sampled."""

    name: str
    family: str
    blamed: str
    """The module that is suspected where the samples differ."""
    is_head: bool = False


def taps(
    places: Iterable[Place], tokens: int, seed: int, *, budget: int = 1 << 20, outputs: bool = False
) -> dict[str, SamplingTap]:
    """Taps that sample places, the output head thoroughly; arguments are those of ``SamplingTap``."""
    order = count()
    return {place.name: SamplingTap(tokens, seed, order, budget, outputs, place.is_head) for place in places}


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
        if before and after and self.place.is_head:
            # Logits of the tokens that both vocabularies have.
            shared = min(before.rows.shape[1], after.rows.shape[1])
            before, after = before.first(shared), after.first(shared)
        if before and after and before.comparable(after) and before.finite and after.finite:
            return before.rows.float(), after.rows.float()
        return None

    def _samples(self, kind: Kind) -> tuple[Sampled | None, Sampled | None]:
        return self.before.samples.get(kind), self.after.samples.get(kind)


def seen_places(context: Mapping[str, Any], places: Mapping[str, Place], compared: Kind) -> list[SeenPlace]:
    """Places at which something was sampled, in the order in which the edited model calls them."""
    observed = (context.get("observations", {}).get(side, {}) for side in ("baseline", "edited"))
    before, after = (_on_host({name: Seen.of(result) for name, result in side.items()}) for side in observed)
    both = [
        SeenPlace(places[name], before[name], seen, compared)
        for name, seen in after.items()
        if name in before and seen.samples.get(compared)
    ]
    return sorted(both, key=lambda seen: seen.after.order)


def _on_host(seen: Mapping[str, Seen]) -> dict[str, Seen]:
    """The same with all samples on the CPU: an operation on small ones takes a GPU as long as one on large ones."""
    rows = iter(on_host([sample.rows for each in seen.values() for sample in each.samples.values() if sample]))
    return {
        name: replace(
            each,
            samples={kind: sample and replace(sample, rows=next(rows)) for kind, sample in each.samples.items()},
        )
        for name, each in seen.items()
    }


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
