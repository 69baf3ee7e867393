"""One pass of a model over its windows: taps on the preview ones, log loss and predictions of the final ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.progress import Tally
from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.evaluation.predictions import Comparer, Recorder, TokenChanges, TokenRecord, Watch
from invarlock.evaluation.statistics import exp, mean_per_token
from invarlock.evaluation.taps import Rows, Tap, attached
from invarlock.models.facts import Task, batch_size, device_of, evaluating, is_streamed, logits_of
from invarlock.models.output_head import Head, set_aside_head
from invarlock.models.structure import find_blocks

CHUNK_BYTES = 4 * 2**20


@dataclass(frozen=True, eq=False)
class PassResult:
    """Losses of one pass, window by window, in the order of the final windows.

    ``losses`` is float64 (n,): the negative log-likelihood of a window's scored tokens, summed, in nats; it is NaN or
    infinite where the model's is. ``tokens`` is int64 (n,): how many tokens were scored. Beside them, for every scored
    token, a pass without a reference has its ``record``, a pass with one has the ``changes`` from it.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    record: TokenRecord | None = None
    changes: TokenChanges | None = None

    @classmethod
    def joined(cls, parts: Sequence[PassResult]) -> PassResult:
        """One result of passes over windows that follow each other, without their records."""
        changes = [part.changes for part in parts if part.changes is not None]
        return cls(
            np.concatenate([part.losses for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            changes=TokenChanges.joined(changes) if changes else None,
        )

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
    reference: TokenRecord | None = None,
    calls: int = 0,
    taps_off: Callable[[], object] = lambda: None,
) -> PassResult:
    """Let every window pass through the model exactly once: the preview windows, then the final ones.

    Through a streamed model all of them go as one batch.

    The model is in evaluation mode meanwhile, without gradients. Losses come from its logits in float32, a few tokens
    at a time. A model that gives NaN is measured, not refused. Progress is in windows, or blocks of a streamed model.

    :param taps: taps of each guard for the preview windows, by module name.
    :param reference: the baseline's record of the same final windows, to compare with; without it a record is made.
    :param calls: lowest number of runs on final windows, the last batch again and unscored if need be:
        processes that a model's weights are spread over have to run it together.
    :param taps_off: called when no tap looks on any more, before the final windows where they come later.
    :raises PluginError: the model's output has no logits, or a tap names no module of the model.
    :raises ValueError: the reference is of other windows.
    """
    watch = Recorder() if reference is None else Comparer(reference)
    with evaluating(model):
        if is_streamed(model):
            scores = [_together(model, preview, final, task, taps, watch)]
            taps_off()
        else:
            tally = Tally(len(preview) + len(final))
            with ExitStack() as stack:
                for wanted in taps:
                    stack.enter_context(attached(model, wanted))
                for batch in _batches(model, preview, tally):
                    _logits(model, batch)
            taps_off()
            batches = _batches(model, final, tally)
            scores = [_score(_logits(model, batch), _targets(batch, task), watch) for batch in batches]
            for _ in range(calls - len(scores)):
                _logits(model, final[-1:])
    losses, tokens = (torch.cat(column).numpy() for column in zip(*scores, strict=True))
    if isinstance(watch, Recorder):
        return PassResult(losses, tokens, record=watch.result())
    return PassResult(losses, tokens, changes=watch.result())


def _batches(model: nn.Module, windows: Windows, tally: Tally) -> Iterator[Windows]:
    """Batches of windows; a batch counts as done when the next one is asked for."""
    for batch in windows.batches(batch_size(model, windows.length)):
        yield batch
        tally.add(len(batch))


def _together(
    model: nn.Module,
    preview: Windows,
    final: Windows,
    task: Task,
    taps: Iterable[Mapping[str, Tap]],
    watch: Watch,
) -> tuple[Tensor, Tensor]:
    """All windows as one batch, so that each weight of a streamed model is read once; their logits would not fit."""
    windows = Windows.joined(preview, final)
    rows = Rows(len(preview), len(windows), windows.input_ids.shape[1])
    blocks = find_blocks(model).values()
    tally = Tally(len(blocks))
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda *_: tally.add()).remove)
        head = stack.enter_context(set_aside_head(model))
        for wanted in taps if len(preview) else ():
            stack.enter_context(attached(model, wanted, rows))
        hidden = _logits(model, windows)
    head.check(hidden)
    return _score(hidden[len(preview) :], _targets(final, task), watch, head)


def _logits(model: nn.Module, batch: Windows) -> Tensor:
    # A cache of keys and values would be kept for a next token that never comes.
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return logits_of(model, model(**batch.inputs(device_of(model)), **uncached))


def _targets(batch: Windows, task: Task) -> Tensor:
    """The token that the logits at each position predict, or -100; shaped as the labels."""
    return functional.pad(batch.labels[:, 1:], (0, 1), value=UNSCORED) if task == "causal" else batch.labels


def _score(logits: Tensor, targets: Tensor, watch: Watch, head: Head | None = None) -> tuple[Tensor, Tensor]:
    """Each window's summed loss, float64, and its number of scored tokens, both (batch,) on the CPU.

    :param head: the head, where hidden states are given in place of logits.
    """
    scored = targets != UNSCORED
    found = []
    for log_probs, wanted in _chunks(logits.flatten(0, 1), targets.flatten(), head):
        found.append(log_probs.gather(1, wanted.unsqueeze(1)).squeeze(1))
        watch.see(log_probs)
    # Summed on the CPU: not every device has float64.
    losses = torch.zeros(targets.shape, dtype=torch.float64)
    losses[scored] = -torch.cat(found).cpu().double()
    return losses.sum(dim=1), scored.sum(dim=1)


def _chunks(table: Tensor, targets: Tensor, head: Head | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities in float32 (tokens, vocabulary) and targets (tokens,), a few scored tokens at a time."""
    scored = (targets != UNSCORED).nonzero().squeeze(1)
    for many in torch.split(scored, head.tokens) if head else (scored,):
        logits = head(_rows(table, many)) if head else table
        places = torch.arange(len(many)) if head else many
        for rows, some in zip(*(torch.split(each, _at_once(logits)) for each in (places, many)), strict=True):
            yield functional.log_softmax(_rows(logits, rows).float(), dim=-1), targets[some].to(logits.device)


def _at_once(logits: Tensor) -> int:
    return max(1, CHUNK_BYTES // (4 * logits.shape[1]))


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table, in ascending order; not copied where they lie side by side."""
    if len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
        return table[rows[0] : int(rows[-1]) + 1]
    return table[rows.to(table.device)]
