"""Runs of a model that begin at one of its blocks, with the hidden states that an earlier run left there.

Blocks before it return what they returned then; all around them (masks, positions, the head) is the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from invarlock.models.structure import find_blocks


def sequence_of_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a model by path, in order; none where they stand in several lists, as those of two towers."""
    blocks = find_blocks(model)
    return blocks if len({path.rpartition(".")[0] for path in blocks}) == 1 else {}


def first_blocks_of(model: nn.Module, blocks: Mapping[str, nn.Module]) -> dict[int, int]:
    """The place of the block that reads a parameter first, by its id; 0 of one that is read outside of all blocks."""
    places: dict[int, int] = {}
    paths = {f"{path}.": place for place, path in enumerate(blocks)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        place = next((place for path, place in paths.items() if name.startswith(path)), 0)
        places[id(parameter)] = min(place, places.get(id(parameter), place))
    return places


@dataclass
class Resuming:
    """A model, and what some of its blocks returned in a run, batch by batch."""

    model: nn.Module
    blocks: Sequence[nn.Module]
    starts: Collection[int] = ()
    """Places of blocks that later runs may begin at."""
    is_sequence: bool = True
    """False once blocks did not run one after the other, each once."""
    _returned: dict[tuple[int, bytes], Any] = field(default_factory=dict)
    """By the start, the outputs of the block before it, for the token ids of a batch."""
    _ids: bytes = b""
    """Of the batch at hand."""

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Keep what the blocks before the starts return, in a run of the whole model."""
        ran: list[int] = []

        def note(place: int, block: nn.Module, given: Any, output: Any) -> None:
            ran.append(place)
            if place + 1 in self.starts:
                self._returned[place + 1, self._ids] = output

        def ended(*_: Any) -> None:
            self.is_sequence &= ran == [*range(len(self.blocks))]
            ran.clear()

        with ExitStack() as stack:
            stack.enter_context(self._batch_noted())
            for place, block in enumerate(self.blocks):
                stack.callback(block.register_forward_hook(partial(note, place)).remove)
            stack.callback(self.model.register_forward_hook(ended).remove)
            yield

    @contextmanager
    def beginning_at(self, start: int) -> Iterator[None]:
        """Let the model run from a block on, over batches that were recorded; 0 stands for the whole of it.

        :raises KeyError: in the run, of another batch.
        """
        with ExitStack() as stack:
            if start:
                stack.enter_context(self._batch_noted())
            for block in self.blocks[:start]:
                stack.enter_context(_forward_of(block, lambda *_, **__: self._returned[start, self._ids]))
            yield

    @contextmanager
    def _batch_noted(self) -> Iterator[None]:
        def note(model: nn.Module, args: Any, kwargs: Mapping[str, Tensor]) -> None:
            self._ids = kwargs["input_ids"].cpu().numpy().tobytes()

        handle = self.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward of a module meanwhile."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
