"""Logits of the next token, step after step, by a model that keeps what it has read in a cache."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from invarlock.core.errors import one_line
from invarlock.distributed.dtensor import sharding_of
from invarlock.models.facts import logits_of, text_config_of

if TYPE_CHECKING:
    from transformers import StaticCache

log = logging.getLogger("invarlock")

EAGER = 3
"""Steps before the recording: libraries allocate what they work with on first use, which no graph can record."""


def caches(model: nn.Module) -> bool:
    """True if the model can go on from the keys and values of tokens that it has read."""
    return "past_key_values" in inspect.signature(model.forward).parameters


@dataclass
class Growing:
    """A cache that is the model's own, and grows with each token."""

    model: nn.Module
    length: int
    """Number of tokens that will be read."""
    inputs: Callable[[Tensor, Tensor], dict[str, Any]]
    """The model's arguments, from all of the rows and the part of them that it has not read yet."""
    given: dict[str, Any] = field(default_factory=lambda: {"use_cache": True})

    def __call__(self, rows: Tensor, fresh: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after the last token."""
        output = self.model(**self.inputs(rows, fresh if self.given["use_cache"] else rows), **self.given)
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            # RecurrentGemma hands none over, though its forward takes one: it reads all of the rows again.
            self.given["use_cache"] = False
        elif "past_key_values" not in self.given:
            # Only here: the module imports transformers.
            from invarlock.models.roomy_cache import make_room

            make_room(cache, self.length)
        self.given |= {"past_key_values": cache} if cache is not None else {}
        return logits_of(self.model, output)[:, -1]


class Replayed:
    """A cache of the full length, and a CUDA graph of the step over one token.

    A step is hundreds of kernels of a few microseconds, and Python starts them more slowly than they run. As all of
    their addresses stay, they are recorded once, and from then on started as one.
    """

    def __init__(self, model: nn.Module, cache: StaticCache) -> None:
        self.model, self.cache = model, cache
        self.steps, self.recordable = 0, True
        self.graph: torch.cuda.CUDAGraph | None = None

    @classmethod
    def of(cls, model: nn.Module, length: int) -> Replayed | None:
        """None for a model that is not whole on one CUDA device, or whose steps are not all the same kernels."""
        devices = {parameter.device for parameter in model.parameters()}
        recordable = getattr(model, "_can_compile_fullgraph", False) and not sharding_of(model)
        if len(devices) != 1 or devices.pop().type != "cuda" or not recordable:
            return None
        from transformers import StaticCache
        from transformers.cache_utils import StaticLayer

        cache = StaticCache(text_config_of(model), max_cache_len=length)
        # A sliding window takes another way once it is full.
        return cls(model, cache) if all(type(layer) is StaticLayer for layer in cache.layers) else None

    def __call__(self, fresh: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after the last of some tokens, (rows, tokens), that have not been read yet.

        They hold until the next step.
        """
        if fresh.shape[1] == 1 and self.steps >= EAGER and self.graph is None and self.recordable:
            self._record(fresh)
        self.steps += 1
        if self.graph is None:
            return self._step(fresh)
        self.fresh.copy_(fresh)
        self.graph.replay()
        return self.logits

    def _step(self, fresh: Tensor) -> Tensor:
        output = self.model(input_ids=fresh, past_key_values=self.cache, use_cache=True)
        return logits_of(self.model, output)[:, -1]

    def _record(self, fresh: Tensor) -> None:
        self.fresh, graph, stream = fresh.clone(), torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self.logits = self._step(self.fresh)
        except RuntimeError as error:
            # Some models wait for the device, or copy from the host, whatever transformers says of them.
            torch.cuda.set_stream(stream)
            log.info("the steps of %s cannot be recorded: %s", type(self.model).__name__, one_line(error))
            self.recordable = False
        else:
            self.graph = graph
