"""Predictions at every scored token: the baseline's record, and the changes by an edit.

Both are taken from the log-probabilities that the loss is taken from, a few tokens at a time; no logits are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

KEPT = 32
"""Likeliest tokens in a record. For the demo model and SmolLM2 they show 0.72 to 0.90 of the divergence, 16 show 0.45
to 0.84, at three quarters of the cost."""

GROUP = 64
SMALLEST_REST = 2.0**-20
"""Float32 log-probabilities do not tell smaller remainders from zero."""


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """The likeliest tokens at each of n scored positions, likeliest first, on the CPU.

    ``tokens`` is int32 (n, K), ``log_probs`` float32 (n, K): 8 K bytes per position, whatever the vocabulary. All other
    tokens are one bucket; its probability is what these leave. Float16 would be half of that, but an unedited model
    would then differ from its own record.
    """

    tokens: Tensor
    log_probs: Tensor
    vocabulary: int
    """Number of tokens that were predicted among."""

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class TokenChanges:
    """Changes of predictions against a record, at each of n scored positions; NaN or infinite where the model's are.

    ``kl`` is float64 (n,), in nats: the divergence of the predicted distribution from the record's, over the record's
    tokens and the bucket of all others. By the data-processing inequality (Cover and Thomas 2006, section 2.8) it is a
    lower bound of the divergence over the whole vocabulary. ``flipped`` is bool (n,): a token that was the likeliest is
    so no longer; equals are not told apart, and a prediction that is not finite has flipped. ``margin`` is float64
    (n,), in nats: by how much the token that was the likeliest surpasses the likeliest other one, in log-probability;
    it is negative after a flip. ``margin_before`` is the same of the record.
    """

    kl: NDArray[np.float64]
    flipped: NDArray[np.bool_]
    margin: NDArray[np.float64]
    margin_before: NDArray[np.float64]

    @classmethod
    def joined(cls, parts: Sequence[TokenChanges]) -> TokenChanges:
        """Changes at consecutive positions, joined."""
        return cls(*(np.concatenate([getattr(part, entry.name) for part in parts]) for entry in fields(cls)))


@dataclass
class Recorder:
    """Record in the making, of predictions for scored tokens that are shown in their order, some at a time."""

    vocabulary: int = 0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def see(self, log_probs: Tensor) -> None:
        """Take note of log-probabilities, float32 (some tokens, vocabulary), on any device."""
        self.vocabulary = log_probs.shape[1]
        values, tokens = likeliest(log_probs, min(KEPT, log_probs.shape[1]))
        self.seen.append((tokens.int(), values))

    def result(self) -> TokenRecord:
        tokens, log_probs = _joined(self.seen)
        return TokenRecord(tokens, log_probs, self.vocabulary)


@dataclass
class Comparer:
    """Comparison with a record, shown predictions as :class:`Recorder` is.

    Tokens that the edited model does not know, because its vocabulary is smaller, join the bucket of all others.
    """

    record: TokenRecord
    vocabulary: int = 0
    done: int = 0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def see(self, log_probs: Tensor) -> None:
        rows = slice(self.done, self.done + len(log_probs))
        self.done, self.vocabulary = rows.stop, log_probs.shape[1]
        if self.done > len(self.record):
            raise ValueError("the reference has fewer scored tokens than the windows")
        tokens = self.record.tokens[rows].to(log_probs.device).long()
        after = log_probs.gather(1, tokens.clamp(max=self.vocabulary - 1))
        self.seen.append((likeliest(log_probs, 2)[0], after.masked_fill(tokens >= self.vocabulary, -torch.inf)))

    def result(self) -> TokenChanges:
        if self.done != len(self.record):
            raise ValueError("the reference has more scored tokens than the windows")
        best, after = (column.double() for column in _joined(self.seen))
        before = self.record.log_probs.double()
        # Equals for the likeliest: bfloat16 logits often are, and which of them comes first says nothing.
        rival = torch.where(before == before[:, :1], after, -torch.inf).amax(dim=1)
        own = after[:, 0]
        margin = own - torch.where(own < best[:, 0], best[:, 0], best[:, 1])
        known = before.masked_fill(self.record.tokens >= self.vocabulary, -torch.inf)
        return TokenChanges(
            kl=coarse_divergence(known, after).numpy(),
            flipped=~(rival >= best[:, 0]).numpy(),
            margin=margin.numpy(),
            margin_before=(before[:, 0] - before[:, 1]).numpy(),
        )


def coarse_divergence(before: Tensor, after: Tensor) -> Tensor:
    """The Kullback-Leibler divergence over some tokens and the bucket of all others, in nats, float64 (n,).

    :param before: log-probabilities of those tokens, float64 (n, K); the expectation is taken under these.
    :param after: log-probabilities of the same tokens, float64 (n, K).
    """
    kept = torch.where(before > -torch.inf, before.exp() * (before - after), 0.0).sum(dim=1)
    rest_before, rest_after = (1 - log_probs.exp().sum(dim=1) for log_probs in (before, after))
    # A larger remainder after the edit makes the divergence smaller: still a lower bound.
    rise = rest_before.clamp(min=SMALLEST_REST).log() - rest_after.clamp(min=SMALLEST_REST).log()
    return (kept + rest_before.clamp(min=0) * rise).clamp(min=0)


def likeliest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row and their columns, as ``torch.topk``; in half of its time for many columns.

    The largest ``count`` values lie in the ``count`` groups with the largest maxima, so only those are searched.
    """
    rows, columns = values.shape
    groups = columns // GROUP
    if groups < 2 * count:
        found = values.topk(count)
        return found.values, found.indices
    grouped, tail = values[:, : groups * GROUP].view(rows, groups, GROUP), values[:, groups * GROUP :]
    best = grouped.amax(dim=2).topk(count).indices
    row = torch.arange(rows, device=values.device).unsqueeze(1)
    found = torch.cat([grouped[row, best].flatten(1), tail], dim=1).topk(count)
    # Back to columns; the tail is one more group, after the searched ones.
    firsts = functional.pad(best, (0, 1), value=groups) * GROUP
    return found.values, firsts.gather(1, found.indices // GROUP) + found.indices % GROUP


def _joined(seen: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [torch.cat(column).cpu() for column in zip(*seen, strict=True)]
