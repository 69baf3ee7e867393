"""Losses of the same text on two sides whose tokenizers split it in different ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from invarlock.datasets.shared_text import Places, Shared
from invarlock.evaluation.passes import PassResult
from invarlock.models.facts import Predicted


def over_same_text(
    baseline: PassResult, subject: PassResult, shared: Sequence[Shared], *, task: Predicted = "causal"
) -> tuple[PassResult, PassResult]:
    """Two passes over windows of the same text, cut down to the text that can be compared.

    A loss per token says nothing where tokens differ; the loss of a text does not depend on how it is split, but for
    what the model makes of it. It is the sum of the losses of the tokens that stand for it, in nats, on either side.

    :param shared: of each window; further ones are left out.
    :returns: both passes, with the losses of the shared text in nats, its ``bytes``, and as ``tokens`` the number of
        the baseline's in it: by that a limit per token becomes one per byte. A window without such text has neither.
    """
    shared = shared[: len(baseline.losses)]
    before = _summed(baseline, [each.baseline for each in shared], task)
    after = _summed(subject, [each.subject for each in shared], task)
    tokens = np.array([each.baseline.sum() for each in shared], dtype=np.int64)
    sizes = np.array([each.bytes for each in shared], dtype=np.int64)
    return PassResult(before, tokens, bytes=sizes), PassResult(after, tokens, bytes=sizes)


def _summed(measured: PassResult, counted: Sequence[Places], task: Predicted) -> NDArray[np.float64]:
    """The loss of the labels that count, of each window: a causal model's logits at i predict the label at i + 1."""
    if measured.position_losses is None:
        raise ValueError("a pass without the losses of its positions")
    losses, places = measured.position_losses.astype(np.float64), np.stack(counted)
    if task == "causal":
        losses, places = losses[:, :-1], places[:, 1:]
    summed: NDArray[np.float64] = np.where(places, losses, 0.0).sum(axis=1)
    return summed
