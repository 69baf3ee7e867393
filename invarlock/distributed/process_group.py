"""Several processes on one run: torchrun, Slurm or MPI start them, and they meet wherever one needs what others found.

They share the evaluation windows, the shards of a streamed model, and the work of guards that look at weights alone;
other guards run on the first of them, so that each result is there once, as in a run of one process. Where a model in
memory is spread over them, all do all things together.
"""

from __future__ import annotations

import datetime
import os
import socket
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, count
from typing import Any, TypeVar

from invarlock.core.errors import PeerError, PluginError, UsageError, one_line
from invarlock.core.progress import Shown, showing, shown_now
from invarlock.distributed.launchers import local_rank, rendezvous_address, started_by

Found = TypeVar("Found")

RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=5)
"""Longest wait for all processes to join."""
COLLECTIVE_TIMEOUT = datetime.timedelta(days=7)
"""Longest wait in an exchange: other processes may work for hours. A process that dies is noticed at once, if its
machine still closes its connections."""


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """The processes of this run, met; whatever is raised in the block ends it on all of them."""
    ranks = Ranks.join()
    try:
        yield ranks
    except KeyboardInterrupt:
        # It may have come in the midst of an exchange: another one would be out of step. The others notice the end.
        raise
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.leave()


@cache
def _control_group() -> Any:
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)


@dataclass
class Ranks:
    """Rank of this process and number of all, with the exchanges between them."""

    rank: int = 0
    size: int = 1
    _store: Any = field(default=None, compare=False)
    """Store in which all processes add up numbers without waiting for each other."""
    _shared: Iterator[int] = field(default_factory=count, compare=False)

    @classmethod
    def join(cls) -> Ranks:
        """Meet the other processes, if a launcher has started several.

        :raises PluginError: they could not be reached.
        """
        launcher = started_by()
        if launcher is None:
            return cls()
        ranks = cls(int(os.environ[launcher.rank]), int(os.environ[launcher.size]))
        if ranks.size > 1:
            ranks._rendezvous(*rendezvous_address(launcher))
        return ranks

    def _rendezvous(self, address: str, port: int) -> None:
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        # Results are exchanged on the CPU, parts of weights and activations where they are.
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(local_rank() % torch.cuda.device_count())
        os.environ.setdefault("MASTER_ADDR", address)
        os.environ.setdefault("MASTER_PORT", str(port))
        try:
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=RENDEZVOUS_TIMEOUT))
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=RENDEZVOUS_TIMEOUT
            )
            dist.barrier()
            self._store = store
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise PluginError(
                f"rank {self.rank}: cannot reach the other processes at {where}: {one_line(error)}"
            ) from error

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, found: Found) -> list[Found]:
        """Results of all processes, in the order of their ranks, on each of them.

        :raises PeerError: one of them failed instead, or is gone.
        """
        return self._exchange(found, None)

    def on_this_machine(self) -> int:
        """Number of processes of the run on this machine; a collective call."""
        name = socket.gethostname()
        return self.gather(name).count(name)

    def from_first(self, make: Callable[[], Found]) -> Found:
        """Result of the first process, on all of them; no other one calls ``make``."""
        return self.gather(make() if self.is_first else None)[0]  # type: ignore[return-value]

    @contextmanager
    def progress_summed(self) -> Iterator[None]:
        """Let progress in the block be of work that is shared: what each process tells of its part is added up.

        All have to enter it in the same order.
        """
        if self.size == 1:
            yield
            return
        with showing(_Summed(self._store, f"invarlock/{next(self._shared)}", shown_now())):
            yield

    def fail(self, error: BaseException) -> None:
        """Tell the other processes, at their next exchange, that this one failed."""
        if self.size > 1 and not isinstance(error, PeerError):
            try:
                self._exchange(None, f"{type(error).__name__}: {one_line(error)}")
            except PeerError:
                return

    def leave(self) -> None:
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
            _control_group.cache_clear()

    def share(self, count: int, *, ahead: int = 0) -> slice:
        """This process's part of so many things, side by side.

        :param ahead: number of additional ones that the first process does.
        :raises UsageError: there are fewer than processes.
        """
        if count < self.size:
            raise UsageError(f"dataset.final_n: {count} windows cannot be shared by {self.size} processes; start fewer")
        each = (count + ahead) / self.size

        def end(ranks: int) -> int:
            # At least one for everybody.
            return max(ranks, min(count - self.size + ranks, round(each * ranks) - ahead))

        return slice(end(self.rank) if self.rank else 0, end(self.rank + 1))

    def part(self, sizes: Sequence[int]) -> slice:
        """This process's part of things side by side, each of so many bytes: about as many as any other's."""
        whole = sum(sizes) or 1
        middles = (end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True))
        owners = [min(self.size - 1, int(middle * self.size / whole)) for middle in middles]
        return slice(bisect_left(owners, self.rank), bisect_right(owners, self.rank))

    def _exchange(self, found: Found, failure: str | None) -> list[Found]:
        if self.size == 1:
            return [found]
        import torch.distributed as dist

        entries: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(entries, (found, failure), group=_control_group())
        except RuntimeError as error:
            raise PeerError(f"rank {self.rank}: another process of the run has ended: {one_line(error)}") from error
        failures = [f"rank {rank}: {why}" for rank, (_, why) in enumerate(entries) if why and rank != self.rank]
        if failures:
            raise PeerError("; ".join(failures))
        return [entry for entry, _ in entries]


@dataclass
class _Summed:
    store: Any
    name: str
    show: Shown
    done: int = 0
    total: int = 0

    def __call__(self, done: int, total: int) -> None:
        all_done = self.store.add(f"{self.name}/done", done - self.done)
        whole = self.store.add(f"{self.name}/total", total - self.total)
        self.done, self.total = done, total
        self.show(all_done, whole)


ALONE = Ranks()
