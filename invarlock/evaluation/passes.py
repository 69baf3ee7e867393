"""One pass of a model over its windows: taps on the preview ones, log loss and predictions of the final ones."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.errors import InputError
from invarlock.core.progress import Tally
from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.distributed.dtensor import sharding_of
from invarlock.evaluation.predictions import Comparer, Recorder, TokenChanges, TokenRecord
from invarlock.evaluation.statistics import exp, mean_per_token
from invarlock.evaluation.taps import Tap, attached, ends_of, first_windows
from invarlock.models.batches import batch_size, halved
from invarlock.models.facts import Predicted, device_of, evaluating, is_streamed, logits_of
from invarlock.models.sizes import sizes_of
from invarlock.models.structure import find_blocks, output_head

UNMEASURED = "its outputs cannot be measured while it is streamed"

Output = TypeVar("Output")
Result = TypeVar("Result")

Taps = Iterable[Mapping[str, Tap]]
"""Of each guard, by module name."""
Watch = Recorder | Comparer
Scores = tuple[Tensor, Tensor, Tensor]
"""Each window's summed loss, float64, its number of scored tokens, both (batch,), and the loss at each position,
float32 (batch, length); on the CPU."""


@dataclass(frozen=True, eq=False)
class PassResult:
    """Losses of one pass, window by window, in the order of the final windows.

    ``losses`` is float64 (n,): the negative log-likelihood of a window's scored tokens, summed, in nats; it is NaN or
    infinite where the model's is. ``tokens`` is int64 (n,): how many tokens were scored. Beside them, for every scored
    token, a pass without a reference has its ``record``, a pass with one has the ``changes`` from it.

    ``position_losses`` is float32 (n, length), in nats: the loss that the logits at each position of a window have, 0
    where nothing is scored. ``bytes`` is int64 (n,), where losses are those of the same text that two tokenizers split
    in different ways: the size of that text in UTF-8, per byte of which they are compared; ``tokens`` are then those
    that the baseline's tokenizer makes of it.
    """

    losses: NDArray[np.float64]
    tokens: NDArray[np.int64]
    record: TokenRecord | None = None
    changes: TokenChanges | None = None
    position_losses: NDArray[np.float32] | None = None
    bytes: NDArray[np.int64] | None = None
    vectors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Of each sample, (n, numbers) by name, where a model makes vectors and no predictions of tokens; ``losses`` are
    then 0."""
    transcripts: NDArray[np.int64] | None = None
    """Tokens that a model wrote of some samples, (n, tokens), where the task compares what it writes."""

    @classmethod
    def joined(cls, parts: Sequence[PassResult]) -> PassResult:
        """One result of passes over windows that follow each other, without their records."""
        changes = [part.changes for part in parts if part.changes is not None]
        positions = [part.position_losses for part in parts if part.position_losses is not None]
        transcripts = [part.transcripts for part in parts if part.transcripts is not None]
        return cls(
            np.concatenate([part.losses for part in parts]),
            np.concatenate([part.tokens for part in parts]),
            changes=TokenChanges.joined(changes) if changes else None,
            position_losses=np.concatenate(positions) if positions else None,
            vectors={name: np.concatenate([part.vectors[name] for part in parts]) for name in parts[0].vectors},
            transcripts=np.concatenate(transcripts) if transcripts else None,
        )

    def first(self, windows: int) -> PassResult:
        """Losses of the first windows alone."""
        return PassResult(
            self.losses[:windows], self.tokens[:windows], bytes=None if self.bytes is None else self.bytes[:windows]
        )

    def reordered(self, samples: NDArray[np.int64]) -> PassResult:
        """The result with its samples, of which it has vectors, in another order."""
        ends = np.cumsum(self.tokens)
        rows = np.concatenate([np.arange(ends[each] - self.tokens[each], ends[each]) for each in samples])
        vectors = {name: of_all[rows] for name, of_all in self.vectors.items()}
        return replace(self, losses=self.losses[samples], tokens=self.tokens[samples], vectors=vectors)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Of each window, in units that losses are compared per: bytes where they are counted, or scored tokens."""
        return self.tokens if self.bytes is None else self.bytes

    @property
    def perplexity(self) -> float:
        """exp(mean loss per token, or per byte); infinite where that overflows, NaN where nothing was scored."""
        return exp(mean_per_token(self.losses, self.sizes)) if self.sizes.any() else math.nan


def measure(
    model: nn.Module,
    preview: Windows,
    final: Windows,
    *,
    task: Predicted,
    taps: Taps = (),
    reference: TokenRecord | None = None,
    vocabulary: int | None = None,
    calls: int = 0,
    at_once: int | None = None,
    taps_off: Callable[[], object] = lambda: None,
) -> PassResult:
    """Let every window pass through the model at most once: the preview windows that taps look at, then the final ones.

    Through a streamed model all of them go as one batch.

    The model is in evaluation mode meanwhile, without gradients. Losses come from its logits in float32, a few tokens
    at a time. A model that gives NaN is measured, not refused. Progress is in windows, or blocks of a streamed model.

    :param taps: for the preview windows.
    :param reference: the baseline's record of the same final windows, to compare with; without it a record is made.
    :param vocabulary: number of tokens to predict among, where the model has more: rows that pad a vocabulary, or were
        added to it, take no part. By default the reference's, or all.
    :param calls: lowest number of runs on final windows, the last batch again and unscored if need be:
        processes that a model's weights are spread over have to run it together.
    :param at_once: windows of a batch; by default as many as suit the device.
    :param taps_off: called when no tap looks on any more, before the final windows where they come later.
    :raises PluginError: the model's output has no logits, or a tap names no module of the model.
    :raises ValueError: the reference is of other windows.
    """
    watch = Recorder() if reference is None else Comparer(reference)
    vocabulary = reference.vocabulary if reference else vocabulary
    with evaluating(model):
        if is_streamed(model):
            scores = [_together(model, preview, final, task, taps, watch, vocabulary)]
            taps_off()
        else:
            batches = Batches(model, Tally(len(preview) + len(final)), uncached_logits, at_once)
            batches.tap(preview, taps)
            taps_off()
            scores = batches.run(
                final, lambda batch, logits: _score(logits[..., :vocabulary], predicted_tokens(batch, task), watch)
            )
            for _ in range(calls - len(scores)):
                uncached_logits(model, final[-1:])
    losses, tokens, positions = (torch.cat(column).numpy() for column in zip(*scores, strict=True))
    if isinstance(watch, Recorder):
        return PassResult(losses, tokens, record=watch.result(), position_losses=positions)
    return PassResult(losses, tokens, changes=watch.result(), position_losses=positions)


@dataclass
class Batches(Generic[Output]):
    """Windows on their way through a model, as many at once as its device has memory for."""

    model: nn.Module
    tally: Tally
    forward: Callable[[nn.Module, Windows], Output]
    at_once: int | None = None
    """Number of windows of a batch; None leaves it to the device."""
    largest: int | None = None
    """Number of windows that is known to fit, once more did not."""

    def run(self, windows: Windows, use: Callable[[Windows, Output], Result]) -> list[Result]:
        """Results of ``use`` for each batch and the model's output, in the order of the windows.

        :raises UsageError: the device has no memory for a single window.
        """
        done, results = 0, []
        while done < len(windows):
            batch, output = self._passed(windows[done:])
            results.append(use(batch, output))
            # Before the next one is made.
            del output
            done += len(batch)
            self.tally.add(len(batch))
        return results

    def tap(self, windows: Windows, taps: Taps) -> None:
        """Run the model over windows for taps on it, each of them for as many as it looks at.

        Of a model whose weights are spread over processes all windows are run: the processes run it together.
        """
        ends = ends_of(taps, windows)
        stops = sorted({end for end, _ in ends} | ({len(windows)} if sharding_of(self.model) else set()))
        if any(stops) and device_of(self.model).type != "cpu":
            # To know how many fit at once: a batch that is begun again would be seen twice.
            self._passed(windows[: stops[-1]])
        done = 0
        for stop in stops:
            with ExitStack() as stack:
                for of_guard in (of_guard for end, of_guard in ends if end >= stop):
                    stack.enter_context(attached(self.model, of_guard))
                self.run(windows[done:stop], lambda batch, output: None)
            done = stop
        if left := len(windows) - done:
            self.tally.add(left)

    def _passed(self, windows: Windows) -> tuple[Windows, Output]:
        """The first of some windows, as many as fit at once, and the model's output."""
        while True:
            wanted = self.at_once or batch_size(self.model, windows.length)
            batch = windows[: min(wanted, self.largest or len(windows))]
            try:
                return batch, self.forward(self.model, batch)
            except torch.OutOfMemoryError as error:
                spread = bool(sharding_of(self.model))
                self.largest = halved(self.model, len(batch), batch.length, error, one_only=spread)


def _together(
    model: nn.Module,
    preview: Windows,
    final: Windows,
    task: Predicted,
    taps: Taps,
    watch: Watch,
    vocabulary: int | None,
) -> Scores:
    """All windows as one batch, so that each weight of a streamed model is read once; their logits would not fit."""
    ends = ends_of(taps, preview)
    preview = preview[: max((end for end, _ in ends), default=0)]
    windows = Windows.joined(preview, final)
    blocks = find_blocks(model).values()
    tally = Tally(len(blocks))
    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(lambda *_: tally.add()).remove)
        head = stack.enter_context(_head_set_aside(model))
        for end, of_guard in ends if len(preview) else ():
            stack.enter_context(attached(model, of_guard, partial(first_windows, end, windows.input_ids.shape)))
        hidden = uncached_logits(model, windows)
    head.check(hidden)
    return _score(hidden[len(preview) :], predicted_tokens(final, task), watch, head.of(vocabulary))


@dataclass(frozen=True, eq=False)
class _Head:
    """A linear head with its weights in memory: (vocabulary, features) and, if it has one, (vocabulary,)."""

    weight: Tensor
    bias: Tensor | None
    given: list[Tensor]
    """Hidden states that the model passed to its head, one tensor per call."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of hidden states (tokens, features)."""
        return functional.linear(hidden, self.weight, self.bias)

    def of(self, vocabulary: int | None) -> _Head:
        """The head of the first tokens of the vocabulary alone."""
        return _Head(self.weight[:vocabulary], None if self.bias is None else self.bias[:vocabulary], self.given)

    @property
    def tokens(self) -> int:
        """Number of tokens whose logits are made at once."""
        return max(1, sizes_of(self.weight.device).logits // (4 * len(self.weight)))

    def check(self, instead: Tensor) -> None:
        """Refuse a model that changes the logits of its head: its output in place of them is not the head's input."""
        if len(self.given) != 1 or not torch.equal(instead, self.given[0].to(instead.dtype)):
            raise InputError(f"{UNMEASURED}: it changes its head's logits")


@contextmanager
def _head_set_aside(model: nn.Module) -> Iterator[_Head]:
    """Let the model output the input of its linear head in place of logits."""
    module = output_head(model)
    if not isinstance(module, nn.Linear):
        raise InputError(f"{UNMEASURED}: it has no linear output head")
    # Cloned, because any operation on streamed weights reads them.
    head = _Head(module.weight.clone(), None if module.bias is None else module.bias.clone(), [])

    def unchanged(hidden: Tensor) -> Tensor:
        head.given.append(hidden)
        return hidden

    module.forward = unchanged  # type: ignore[method-assign, assignment]
    try:
        yield head
    finally:
        del module.forward


def uncached_logits(model: nn.Module, batch: Windows) -> Tensor:
    # A cache of keys and values would be kept for a next token that never comes.
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return logits_of(model, model(**batch.inputs(device_of(model)), **uncached))


def predicted_tokens(batch: Windows, task: Predicted) -> Tensor:
    """The token that the logits at each position predict, or -100; shaped as the labels."""
    return functional.pad(batch.labels[:, 1:], (0, 1), value=UNSCORED) if task == "causal" else batch.labels


def _score(logits: Tensor, targets: Tensor, watch: Watch, head: _Head | None = None) -> Scores:
    """Scores of a batch from its logits, or from hidden states where there is a head to make logits of them."""
    scored = targets != UNSCORED
    found = []
    for log_probs, wanted in _chunks(logits.flatten(0, 1), targets.flatten(), head):
        found.append(log_probs.gather(1, wanted.unsqueeze(1)).squeeze(1))
        watch.see(log_probs)
    # Summed on the CPU: not every device has float64.
    losses = torch.zeros(targets.shape, dtype=torch.float64)
    losses[scored] = -torch.cat(found).cpu().double()
    return losses.sum(dim=1), scored.sum(dim=1), losses.float()


def _chunks(table: Tensor, targets: Tensor, head: _Head | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities in float32 (tokens, vocabulary) and targets (tokens,), a few scored tokens at a time."""
    scored = (targets != UNSCORED).nonzero().squeeze(1)
    for many in torch.split(scored, head.tokens) if head else (scored,):
        logits = head(_rows(table, many)) if head else table
        places = torch.arange(len(many)) if head else many
        at_once = max(1, sizes_of(logits.device).log_probs // (4 * logits.shape[1]))
        for rows, some in zip(*(torch.split(each, at_once) for each in (places, many)), strict=True):
            yield functional.log_softmax(_rows(logits, rows).float(), dim=-1), targets[some].to(logits.device)


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table, in ascending order; not copied where they lie side by side."""
    if len(rows) and int(rows[-1] - rows[0]) == len(rows) - 1:
        return table[rows[0] : int(rows[-1]) + 1]
    return table[rows.to(table.device)]
