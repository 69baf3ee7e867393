"""Losses of the same text on two sides whose tokenizers split it in different ways."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from invarlock.evaluation.passes import PassResult
from invarlock.models.facts import Predicted

Side = tuple[PassResult, NDArray[np.int64]]
"""A pass, and the place in the text where the token at each position of its windows ends, in bytes; -1 for no text."""


def over_same_text(baseline: Side, subject: Side, *, task: Predicted = "causal") -> tuple[PassResult, PassResult]:
    """Two passes of causal or seq2seq models over windows of the same text, cut down to what can be compared.

    A loss per token says nothing where tokens differ; the loss of a text does not depend on how it is split, but for
    what the model makes of it. So in each window a span is taken that begins and ends where a token ends on *both*
    sides, the longest one: its loss is the sum of the losses of the tokens in it, in nats, on either side, and its size
    is that of its text, in bytes. A token or two at each end of a window are left out: the first one has no prediction,
    and the last one may be a part of a character.

    :returns: both passes, with the losses of the spans in nats, their ``bytes``, and as ``tokens`` the number of the
        baseline's in them: by that a limit per token becomes one per byte. A window without such a span has neither.
    """
    sides = [_by_target(*side, task) for side in (baseline, subject)]
    spans = np.array([_span(*ends) for ends in zip(*(ends for _, ends in sides), strict=True)], dtype=np.int64)
    first, last = spans[:, :1], spans[:, 1:]
    inside = [(first < ends) & (ends <= last) for _, ends in sides]
    tokens, sizes = inside[0].sum(axis=1), (last - first)[:, 0]
    before, after = (np.where(mask, losses, 0.0).sum(axis=1) for mask, (losses, _) in zip(inside, sides, strict=True))
    return PassResult(before, tokens, bytes=sizes), PassResult(after, tokens, bytes=sizes)


def _by_target(
    measured: PassResult, ends: NDArray[np.int64], task: Predicted
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The loss and the end of each token that is predicted: a causal model's logits at i predict the token at i + 1."""
    if measured.position_losses is None:
        raise ValueError("a pass without the losses of its positions")
    losses = measured.position_losses.astype(np.float64)
    return (losses[:, :-1], ends[:, 1:]) if task == "causal" else (losses, ends)


def _span(before: NDArray[np.int64], after: NDArray[np.int64]) -> tuple[int, int]:
    """The ends of the longest span that both sides have of one window, or two zeros."""
    ours, theirs = before[before >= 0], after[after >= 0]
    if not len(ours) or not len(theirs):
        return 0, 0
    shared = np.intersect1d(ours, theirs)
    shared = shared[shared < min(ours.max(), theirs.max())]
    return (int(shared[0]), int(shared[-1])) if len(shared) else (0, 0)
