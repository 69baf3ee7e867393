"""The text of a baseline's windows, as another tokenizer splits it.

Places in the text are counted in bytes of UTF-8 over all documents, one after the other. A token is known by the place
where it ends: it stands for the text since the token before it. Several tokens of one character all end with it.
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
from invarlock.datasets.windows import Dataset, conversation_places, pieces, read_rows, read_tokens

NO_TEXT = -1
"""In place of an end: a special token, the end of a document, or padding."""


@dataclass(frozen=True, eq=False)
class SameText:
    """Windows over the text of other windows, which another tokenizer made."""

    windows: Windows
    """Padded on the right, because they are not of one length; padding is masked, and never scored."""
    ends: Tensor
    """Where in the text the token at each of their labels ends, in bytes, or ``NO_TEXT``: int64 (n, length)."""
    baseline_ends: Tensor
    """The same of the windows that the text is taken from: int64 (n, their length)."""


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
    """The final windows of a dataset as the subject's tokenizer splits their text, for a causal or a seq2seq model.

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
    rows, own = rows[dataset.preview_n :], own[dataset.preview_n :]
    if subject.layout.start is None:
        read = _padded(own, subject.layout, most)
        return SameText(Windows(read.ids, read.mask, read.labels), read.ends, _padded(rows, baseline.layout).ends)
    sources, targets = ([_half(row, place) for row in rows] for place in (0, 1))
    source, target = (_padded(list(_covering(tokens, part)), subject.layout, most) for part in (sources, targets))
    windows = Windows(source.ids, source.mask, target.labels, subject.layout.late(target.ids))
    return SameText(windows, target.ends, _padded(targets, baseline.layout).ends)


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
