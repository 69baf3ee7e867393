"""Tokens of two tokenizers that stand for the same bytes of one text.

A token is known by the place where it ends, in bytes: it stands for the text since the token before it. Several tokens
of one character all end with it. Special tokens, the end of a document and padding have ``NO_TEXT`` in place of one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NO_TEXT = -1

Ends = NDArray[np.int64]
"""Of the tokens of one window, (length,)."""
Places = NDArray[np.bool_]
"""Positions of one window, (length,)."""


class Shared(NamedTuple):
    """Tokens of one window on two sides that stand for the same text."""

    baseline: Places
    subject: Places
    bytes: int


class Hiding(NamedTuple):
    """The tokens that a window of the subject hides, and those of hidden text that both sides predict."""

    hidden: Places
    shared: Shared


def longest_span(baseline: Ends, subject: Ends) -> Shared:
    """The longest span of text that begins and ends where a token ends on both sides.

    A token or two at each end of a window are left out: what comes before the first one is not known, and the last one
    may be a part of a character.
    """
    shared = _shared_ends(baseline, subject)
    first, last = (int(shared[0]), int(shared[-1])) if len(shared) else (0, 0)
    ours, theirs = ((first < ends) & (ends <= last) for ends in (baseline, subject))
    return Shared(ours, theirs, last - first)


def same_hidden(baseline: Ends, hidden: Places, subject: Ends, special: Places) -> Hiding:
    """Hide from the subject all text that is hidden from the baseline.

    Hidden tokens are predicted each on its own, so that the losses of several add up to more than the loss of the text
    that they stand for. So that this never favours the subject, only text that is a single hidden token of the baseline
    is compared, whatever the subject makes of it. A token of the subject that is hidden in part from the baseline is
    hidden whole: the subject sees nothing that the baseline does not see.

    :param hidden: tokens that are hidden from the baseline.
    :param special: tokens of the subject that stand for no text, such as the unknown one; none of them is compared.
    """
    starts, ends = _starts(baseline)[hidden], baseline[hidden]
    begins = _starts(subject)
    overlaps = (starts < subject[:, None]) & (begins[:, None] < ends)
    covered: Places = overlaps.any(axis=1) & (subject != NO_TEXT)
    shared = _shared_ends(baseline, subject)
    ours, theirs = (np.searchsorted(shared, each) for each in (baseline, subject))
    inside = (ours > 0) & (ours < len(shared))
    alone = np.isin(ours, np.flatnonzero(np.bincount(ours[inside], minlength=1) == 1)) & inside & hidden
    units = np.setdiff1d(ours[alone], theirs[special])
    kept, counted = np.isin(ours, units) & alone, np.isin(theirs, units) & covered
    return Hiding(covered, Shared(kept, counted, int((shared[units] - shared[units - 1]).sum())))


def _shared_ends(baseline: Ends, subject: Ends) -> Ends:
    """Places, in ascending order, where a token ends on both sides and before the last one of either."""
    ours, theirs = baseline[baseline != NO_TEXT], subject[subject != NO_TEXT]
    if not len(ours) or not len(theirs):
        return np.empty(0, dtype=np.int64)
    shared = np.intersect1d(ours, theirs)
    inside: Ends = shared[shared < min(ours.max(), theirs.max())]
    return inside


def _starts(ends: Ends) -> Ends:
    """Where the text of each token begins: at the end of the last one that ends before it."""
    distinct = np.unique(np.append(ends, NO_TEXT))
    starts: Ends = distinct[np.maximum(np.searchsorted(distinct, ends) - 1, 0)]
    return starts
