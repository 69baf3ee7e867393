"""The text of a baseline's windows, as another tokenizer splits it.

Places in the text are counted in bytes of UTF-8 over all documents, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from invarlock.core.errors import InputError
from invarlock.datasets.conversations import ChatTemplate
from invarlock.datasets.layout import UNSCORED, WindowLayout, Windows
from invarlock.datasets.shared_text import NO_TEXT, Shared, longest_span, same_hidden
from invarlock.datasets.windows import Dataset, conversation_places, pieces, read_rows, read_tokens


@dataclass(frozen=True, eq=False)
class SameText:
    """Windows over the text of other windows, which another tokenizer made."""

    windows: Windows
    """Padded on the right, because they are not of one length; padding is masked, and never scored."""
    shared: Sequence[Shared]
    """Of each window, the labels whose losses add up to that of the same text on both sides."""


@dataclass(frozen=True)
class Side:
    """A tokenizer, and the layout of windows that are made with it."""

    tokenizer: Any
    layout: WindowLayout


def read_same_text(
    dataset: Dataset,
    documents: Sequence[str],
    baseline: Side,
    subject: Side,
    *,
    most: int | None,
    chat: ChatTemplate | None = None,
) -> SameText:
    """The final windows of a dataset as the subject's tokenizer splits their text, for a language model.

    The subject's tokens are those of whole documents: a window begins and ends within a word only where a token does.

    :param chat: the baseline's, of a causal model; it renders the text of some windows as conversations, which both
        sides read.
    :param most: largest number of tokens that the subject reads at once; longer windows lose their last ones.
    :raises InputError: a tokenizer does not tell where its tokens stand in the text.
    """
    rows = read_rows(documents, dataset, _Splitter(baseline.tokenizer), baseline.layout.text)
    read_to = max(row[-1].end for row in rows)
    generator = torch.Generator().manual_seed(dataset.seed)
    stream = read_tokens(documents, dataset, _Splitter(subject.tokenizer), generator)
    tokens = list(takewhile(lambda token: token.end <= read_to, stream))
    own = list(_covering(tokens, rows))
    if chat is not None:
        for place in conversation_places(dataset):
            # A text of its own, where places are counted anew: windows are compared one by one.
            text = chat.conversation([token.id for token in rows[place]], baseline.layout.text)
            rows[place] = _split(baseline.tokenizer, text)[: baseline.layout.text]
            own[place : place + 1] = _covering(_split(subject.tokenizer, text), [rows[place]])
    ours, theirs = rows[dataset.preview_n :], own[dataset.preview_n :]
    if subject.layout.mask is not None:
        hidden = _hidden(rows, baseline.layout, dataset.seed)[dataset.preview_n :]
        return _hiding(_padded(ours, baseline.layout), hidden, _padded(theirs, subject.layout, most), subject.layout)
    if subject.layout.start is None:
        before, after = _padded(ours, baseline.layout).ends, _padded(theirs, subject.layout, most)
        windows, ends = Windows(after.ids, after.mask, after.labels), after.ends
        # The first token has no prediction.
        before[:, 0] = ends[:, 0] = NO_TEXT
    else:
        sources, targets = ([_half(row, place) for row in ours] for place in (0, 1))
        source, target = (_padded(list(_covering(tokens, part)), subject.layout, most) for part in (sources, targets))
        windows = Windows(source.ids, source.mask, target.labels, subject.layout.late(target.ids))
        before, ends = _padded(targets, baseline.layout).ends, target.ends
    return SameText(windows, list(map(longest_span, before.numpy(), ends.numpy())))


class _Token(NamedTuple):
    id: int
    end: int
    is_text: bool


class _Splitter:
    """Splits documents that follow each other into tokens, with the place in all of their text where each ends."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._read = 0

    def __call__(self, document: str) -> Iterator[_Token]:
        for piece in pieces(document):
            yield from _split(self._tokenizer, piece, self._read)
            self._read += _bytes(piece)
        if self._tokenizer.eos_token_id is not None:
            yield _Token(self._tokenizer.eos_token_id, self._read, False)


def _split(tokenizer: Any, text: str, start: int = 0) -> list[_Token]:
    """The tokens of a text that starts at a place."""
    ids, ends = _ends(tokenizer, text)
    return [_Token(token, start + end, True) for token, end in zip(ids, ends.tolist(), strict=True)]


def _ends(tokenizer: Any, text: str) -> tuple[list[int], NDArray[np.int64]]:
    """The token ids of a text, and the byte at which each ends."""
    try:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
        characters = np.array([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    except (NotImplementedError, TypeError, LookupError):
        # Tokenizers in Python, and those of adapters that have no more than windows need.
        raise InputError(
            "a tokenizer does not tell where in the text its tokens stand (return_offsets_mapping)"
        ) from None
    sizes = np.fromiter(map(_bytes, text), dtype=np.int64, count=len(text))
    ends = np.concatenate([[0], sizes.cumsum()])[characters]
    return list(encoded["input_ids"]), np.maximum.accumulate(ends)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


def _covering(tokens: Sequence[_Token], rows: Sequence[Sequence[_Token]]) -> Iterator[Sequence[_Token]]:
    """For each row the tokens that end between its first end and its last, at least one."""
    ends = np.array([token.end for token in tokens])
    for row in rows:
        first, last = np.searchsorted(ends, [row[0].end, row[-1].end + 1]).tolist()
        yield tokens[min(first, len(tokens) - 1) : max(first + 1, last)]


def _half(row: Sequence[_Token], place: int) -> Sequence[_Token]:
    """The source in a row of text, or the target."""
    size = len(row) // 2
    return row[place * size : (place + 1) * size]


def _hidden(rows: Sequence[Sequence[_Token]], layout: WindowLayout, seed: int) -> Tensor:
    """Tokens that the baseline's windows of a masked model hide, of the preview ones, too: bool (n, length)."""
    return layout.windows(torch.tensor([[token.id for token in row] for row in rows]), seed=seed).labels != UNSCORED


def _hiding(baseline: _Padded, hidden: Tensor, subject: _Padded, layout: WindowLayout) -> SameText:
    """Windows of a masked model that hide the text that is hidden in the baseline's."""
    special = torch.isin(subject.ids, torch.tensor(layout.special))
    rows = zip(*(each.numpy() for each in (baseline.ends, hidden, subject.ends, special)), strict=True)
    hiding = [same_hidden(*row) for row in rows]
    ids, scored = subject.ids, torch.from_numpy(np.stack([each.shared.subject for each in hiding]))
    covered = torch.from_numpy(np.stack([each.hidden for each in hiding]))
    assert layout.mask is not None
    windows = Windows(ids.masked_fill(covered, layout.mask), subject.mask, ids.masked_fill(~scored, UNSCORED))
    return SameText(windows, [each.shared for each in hiding])


class _Padded(NamedTuple):
    """Rows of text in their layout, padded on the right: int64 (n, length) each."""

    ids: Tensor
    mask: Tensor
    ends: Tensor

    @property
    def labels(self) -> Tensor:
        return self.ids.masked_fill(self.ends == NO_TEXT, UNSCORED)


def _padded(rows: Sequence[Sequence[_Token]], layout: WindowLayout, most: int | None = None) -> _Padded:
    around = len(layout.prefix) + len(layout.suffix)
    rows = [row if most is None else row[: max(1, most - around)] for row in rows]
    length = around + max(map(len, rows))
    ids, ends, mask = (torch.full((len(rows), length), value) for value in (0, NO_TEXT, 0))
    for place, row in enumerate(rows):
        whole = [*layout.prefix, *(token.id for token in row), *layout.suffix]
        ids[place, : len(whole)], mask[place, : len(whole)] = torch.tensor(whole), 1
        text = torch.tensor([token.end if token.is_text else NO_TEXT for token in row])
        ends[place, len(layout.prefix) : len(layout.prefix) + len(row)] = text
    return _Padded(ids, mask, ends)
