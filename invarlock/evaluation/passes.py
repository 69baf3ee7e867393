"""One pass of a model over its windows: taps on the preview ones, the log loss of the final ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from invarlock.evaluation.layout import UNSCORED, Windows
from invarlock.evaluation.models import Task, batch_size, device_of, evaluating, logits_of
from invarlock.evaluation.statistics import exp, mean_per_token
from invarlock.evaluation.taps import Tap, attached

CHUNK_BYTES = 4 * 2**20

Progress = Callable[[int, int], None]
"""Called with the windows done and the windows there are."""


@dataclass(frozen=True, eq=False)
class PassResult:
    """What one pass measured, window by window, in the order of the final windows.

    ``losses`` is float64 (n,): the negative log-likelihood of a window's scored tokens, summed, in nats; it is NaN or
    infinite where the model's is. ``tokens`` is int64 (n,): how many tokens were scored.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def perplexity(self) -> float:
        """exp(mean loss of a scored token); infinite where that overflows, NaN where nothing was scored."""
        return exp(mean_per_token(self.losses, self.tokens)) if self.tokens.any() else math.nan


def measure(
    model: nn.Module,
    preview: Windows,
    final: Windows,
    *,
    task: Task,
    taps: Iterable[Mapping[str, Tap]] = (),
    on_progress: Progress | None = None,
) -> PassResult:
    """Let every window pass through the model exactly once: the preview windows, then the final ones.

    The model is in evaluation mode meanwhile, without gradients. Losses come from its logits in float32, a few tokens
    at a time. A model that gives NaN is measured, not refused.

    :param taps: what each guard wants to look at during the preview windows, by module name.
    :raises PluginError: the model's output has no logits, or a tap names no module of the model.
    """
    batches = _Batches(model, len(preview) + len(final), on_progress)
    with evaluating(model):
        with ExitStack() as stack:
            for wanted in taps:
                stack.enter_context(attached(model, wanted))
            for batch in batches.of(preview):
                _logits(model, batch)
        scores = [_score(_logits(model, batch), _targets(batch, task)) for batch in batches.of(final)]
    losses, tokens = (torch.cat(column).numpy() for column in zip(*scores, strict=True))
    return PassResult(losses, tokens)


class _Batches:
    """Batches of windows; a batch counts as done when the next one is asked for."""

    def __init__(self, model: nn.Module, total: int, on_progress: Progress | None) -> None:
        self.model, self.total, self.on_progress, self.done = model, total, on_progress, 0

    def of(self, windows: Windows) -> Iterator[Windows]:
        for batch in windows.batches(batch_size(self.model, windows.length)):
            yield batch
            self.done += len(batch)
            if self.on_progress:
                self.on_progress(self.done, self.total)


def _logits(model: nn.Module, batch: Windows) -> Tensor:
    # A cache of keys and values would be kept for a next token that never comes.
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return logits_of(model, model(**batch.inputs(device_of(model)), **uncached))


def _targets(batch: Windows, task: Task) -> Tensor:
    """The token that the logits at each position predict, or -100; shaped as the labels."""
    return functional.pad(batch.labels[:, 1:], (0, 1), value=UNSCORED) if task == "causal" else batch.labels


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Each window's summed loss, float64, and its number of scored tokens, both (batch,) on the CPU."""
    losses = [
        functional.cross_entropy(some_logits, some_targets, reduction="none", ignore_index=UNSCORED)
        for some_logits, some_targets in _chunks(logits, targets.to(logits.device))
    ]
    # Summed on the CPU: not every device has float64.
    summed = torch.cat(losses).cpu().double().view(targets.shape).sum(dim=1)
    return summed, (targets != UNSCORED).sum(dim=1)


def _chunks(logits: Tensor, targets: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Float32 logits (tokens, vocabulary) and targets (tokens,), a few tokens at a time."""
    size = max(1, CHUNK_BYTES // (4 * logits.shape[-1]))
    for some_logits, some_targets in zip(
        torch.split(logits.flatten(0, 1), size), torch.split(targets.flatten(), size), strict=True
    ):
        yield some_logits.float(), some_targets
