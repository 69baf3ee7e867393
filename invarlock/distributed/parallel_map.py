"""Work on the weights of a model: on all devices of a process at once and, where a guard shares it, in all processes.

This module imports no torch.
"""

from __future__ import annotations

import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from invarlock.core.errors import PluginError, located
from invarlock.core.progress import Tally
from invarlock.distributed.process_group import Ranks

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Found = TypeVar("Found")


class Weighty(Protocol):
    """A weight, or several that are worked on together."""

    @property
    def device(self) -> torch.device: ...

    @property
    def nbytes(self) -> int: ...


SomeWeight = TypeVar("SomeWeight", bound=Weighty)


def each(work: Callable[[SomeWeight], Found], items: Iterable[SomeWeight]) -> list[Found]:
    """Results of ``work`` for each item, in the order of the items.

    Items on several devices are worked on side by side, in a thread for each device. While all processes of a run ask a
    guard that has ``shares_work``, each works on a part of the items, of about as many bytes as any other's and side by
    side in the model, so that it reads few shards; then all have all that was found.

    :param work: looks at one item and at no other, so that it finds the same in any process; it does not call ``each``.
    :param items: weights, or whatever has their ``device`` and ``nbytes``: the same ones, in the same order, in every
        process.
    :returns: what goes from process to process: numbers, plain classes, tensors on the CPU.
    :raises PluginError: ``work`` failed in some process; where one process does it all, its exception comes as it is.
    """
    items, together = list(items), _together.get()
    return _all_of(work, items) if together is None else together.each(work, items)


def side_by_side(
    work: Callable[[Sequence[Item]], Sequence[Found]], items: Sequence[Item], device: Callable[[Item], torch.device]
) -> list[Found]:
    """Results of ``work`` on the items of each device, in the order of all items; each device has its own thread."""
    places: defaultdict[torch.device, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        places[device(item)].append(place)
    if len(places) < 2:
        return list(work(items))
    found: dict[int, Found] = {}

    def work_on(where: torch.device, of_one: Sequence[int]) -> Sequence[Found]:
        if where.type == "cuda":
            # A thread has no CUDA context of its own until it calls the device, and cuBLAS warns where there is none.
            import torch

            torch.cuda.set_device(where)
            torch.cuda.synchronize(where)
        return work([items[place] for place in of_one])

    with ThreadPoolExecutor(len(places)) as pool:
        parts = pool.map(work_on, places.keys(), places.values())
        for of_one, part in zip(places.values(), parts, strict=True):
            found |= zip(of_one, part, strict=True)
    return [found[place] for place in range(len(items))]


def asked_together(guard: str, ranks: Ranks, ask: Callable[[], Found]) -> list[Found]:
    """Result of a guard in each process, all of which ask it at the same time; ``each`` shares its work.

    :param guard: its name, for messages.
    :raises PluginError: a process failed, or one had finished while another waited for it.
    """
    if ranks.size == 1:
        return [ask()]
    together = _Together(guard, ranks)
    token = _together.set(together)
    try:
        result = ask()
    finally:
        _together.reset(token)
    return together.exchanged("was done", result)


def _all_of(work: Callable[[SomeWeight], Found], items: Sequence[SomeWeight]) -> list[Found]:
    tally = Tally(sum(item.nbytes for item in items))

    def told(item: SomeWeight) -> Found:
        found = work(item)
        tally.add(item.nbytes)
        return found

    return side_by_side(lambda of_one: [told(item) for item in of_one], items, lambda item: item.device)


@dataclass
class _Together:
    """The processes of a run while they ask one guard."""

    guard: str
    ranks: Ranks
    _ended: PluginError | None = field(default=None, init=False)
    """Failure that ended the exchange; the guard may have caught it."""

    def each(self, work: Callable[[SomeWeight], Found], items: Sequence[SomeWeight]) -> list[Found]:
        mine = items[self.ranks.part([item.nbytes for item in items])]
        try:
            with self.ranks.progress_summed():
                part = _Share(_all_of(work, mine))
        except Exception as error:
            part = _Share([], located(error), traceback.format_exc())
        # Another number of items is another place: a guard that sees other weights elsewhere must not go on.
        parts = self.exchanged(f"shared the work on {len(items)} weights", part)
        if failed := next((part for part in parts if part.message), None):
            failure = PluginError(failed.message)
            failure.add_note(failed.trace)
            raise failure
        return [found for part in parts for found in part.found]

    def exchanged(self, where: str, found: Found) -> list[Found]:
        """Contribution of each process, if all are at the same place."""
        if self._ended:
            raise self._ended
        try:
            met = self.ranks.gather((where, found))
            if len({where for where, _ in met}) > 1:
                raise PluginError(f"guard {self.guard}: processes went different ways: {_told(met)}")
        except PluginError as error:
            self._ended = error
            raise
        return [found for _, found in met]


def _told(met: Sequence[tuple[str, Any]]) -> str:
    """Place of each process, and its failure if it has one."""
    messages = (getattr(brought, "message", None) for _, brought in met)
    failures = (f" ({message})" if message else "" for message in messages)
    return ", ".join(
        f"rank {rank} {where}{failure}" for rank, ((where, _), failure) in enumerate(zip(met, failures, strict=True))
    )


@dataclass(frozen=True)
class _Share:
    """Results of one process, or its failure."""

    found: list[Any]
    message: str = ""
    trace: str = ""


_together: ContextVar[_Together | None] = ContextVar("together", default=None)
