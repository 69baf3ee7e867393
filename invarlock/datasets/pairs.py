"""Samples of models that read two texts at once: a query and a passage, a premise and a hypothesis."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.errors import InputError
from invarlock.core.records import Samples, column, columns_of
from invarlock.datasets.drawing import drawn
from invarlock.datasets.layout import UNSCORED, WindowLayout, Windows
from invarlock.datasets.samples import NO_TOKENIZER, padding_of, read_text, split
from invarlock.datasets.windows import Dataset, unreadable

MOST = 8
"""Pairs of a window where there are so many: about as many samples as a window of text holds."""
FIRST = 4
"""One token in so many is of the first text where a text is cut in two: a query is shorter than a passage."""
TYPES = "token_type_ids"


def make_pairs(
    dataset: Dataset, model: nn.Module, tokenizer: Any, documents: Samples | None
) -> tuple[Windows, Windows]:
    """The preview pairs and the final ones; pair i is of window i modulo their number.

    :param documents: pairs, or the texts that are cut in two; None for random tokens.
    :raises UsageError: there are too few of them, or they do not fit the model.
    """
    count = dataset.preview_n + dataset.final_n
    if "text_pair" in columns_of(documents):
        pairs = drawn(documents or (), dataset, most=MOST)
        windows = encoded_pairs(column(pairs, "text"), column(pairs, "text_pair"), dataset, model, tokenizer)
        preview = len(pairs) // count * dataset.preview_n
        return windows[:preview], windows[preview:]
    layout = WindowLayout.of(model, tokenizer, task="causal", length=dataset.seq_len)
    text = read_text(dataset, model, layout, tokenizer, documents)
    first, second = (
        Windows.joined(*(_cut(part, dataset, model, tokenizer) for part in split(rows)))
        for rows in (text[: dataset.preview_n], text[dataset.preview_n :])
    )
    return first, second


def encoded_pairs(
    texts: Sequence[str], others: Sequence[str], dataset: Dataset, model: nn.Module, tokenizer: Any
) -> Windows:
    """A window of each pair as the tokenizer joins them, cut to the length of a window and padded on the right.

    :raises InputError: there is no tokenizer, or it does not fit the model.
    """
    if tokenizer is None:
        raise InputError(NO_TOKENIZER)
    # A copy: truncation is a state of the tokenizer, which has to stay what it was.
    own = copy.deepcopy(tokenizer)
    given = own(list(texts), list(others), truncation=True, max_length=dataset.seq_len, verbose=False)
    ids = _padded(given["input_ids"], dataset.seq_len, padding_of(model))
    mask = _padded([[1] * len(row) for row in given["input_ids"]], dataset.seq_len, 0)
    types = {TYPES: _padded(given[TYPES], dataset.seq_len, 0)} if TYPES in given and _takes_types(model) else {}
    windows = Windows(ids, mask, torch.full_like(ids, UNSCORED), media=types)
    if reason := unreadable(windows, model):
        raise InputError(f"its tokenizer does not fit it: {reason}")
    return windows


def _cut(text: Tensor, dataset: Dataset, model: nn.Module, tokenizer: Any) -> Windows:
    """Pairs of the beginning of each row of text and the rest of it."""
    place = max(1, text.shape[1] // FIRST)
    if tokenizer is not None:
        first, second = (
            [tokenizer.decode(row) for row in part.tolist()] for part in (text[:, :place], text[:, place:])
        )
        return encoded_pairs(first, second, dataset, model, tokenizer)
    ids = _padded(text.tolist(), dataset.seq_len, padding_of(model))
    mask = _padded(torch.ones_like(text).tolist(), dataset.seq_len, 0)
    types = {TYPES: (torch.arange(dataset.seq_len) >= place).long() * mask} if _takes_types(model) else {}
    return Windows(ids, mask, torch.full_like(ids, UNSCORED), media=types)


def _takes_types(model: nn.Module) -> bool:
    """True for a model that is told which of two texts a token is of."""
    known = getattr(getattr(model, "config", None), "type_vocab_size", 0) or 0
    return known > 1 and TYPES in inspect.signature(model.forward).parameters


def _padded(rows: Sequence[Sequence[int]], length: int, value: int) -> Tensor:
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows], dtype=torch.int64)
