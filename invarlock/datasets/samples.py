"""Samples of models that read a text as a whole: several of one window's text, from a few tokens to all of them.

A model that makes one vector of a text says little of a window: so its text is read whole, and once more in short
pieces, as queries and labelled sentences are short. All pieces together are as long as the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.errors import InputError
from invarlock.datasets.layout import UNSCORED, Tokenizer, WindowLayout, Windows
from invarlock.datasets.noise import Noise
from invarlock.datasets.windows import Dataset, check_lengths, read_rows, tokens_of, unreadable
from invarlock.models.facts import vocabulary_of

PIECE = 16
"""Tokens of a short sample: a sentence or a query. 12 windows of 128 tokens then hold 108 samples, on which the exact
interval of a share of labels that differ ends at 3.4 % where none does."""


def make_samples(
    dataset: Dataset, model: nn.Module, tokenizer: Tokenizer | None, documents: Sequence[str] | None
) -> tuple[Windows, Windows]:
    """The preview samples and the final ones of a dataset, padded on the right; sample i is of window i modulo their
    number.

    :param documents: the text of the dataset; None for random tokens.
    :raises UsageError: the windows do not fit the model, or there is too little text for them.
    """
    layout = WindowLayout.of(model, tokenizer, task="causal", length=dataset.seq_len)
    text, pad = read_text(dataset, model, layout, tokenizer, documents), padding_of(model)
    preview, final = text[: dataset.preview_n], text[dataset.preview_n :]
    return _samples(preview, layout, pad), _samples(final, layout, pad)


def read_text(
    dataset: Dataset,
    model: nn.Module,
    layout: WindowLayout,
    tokenizer: Tokenizer | None,
    documents: Sequence[str] | None,
) -> Tensor:
    """The text of each preview window and each final one, int64 (n, ``layout.text``).

    :param documents: the text of the dataset; None for random tokens.
    :raises UsageError: the windows do not fit the model, or there is too little text for them.
    """
    check_lengths(dataset, model)
    if documents is None:
        return random_tokens(model, layout, dataset.preview_n + dataset.final_n, seed=dataset.seed)
    if tokenizer is None:
        raise InputError("it has no tokenizer to read text with; dataset.provider generated needs none")
    text = torch.tensor(read_rows(documents, dataset, partial(tokens_of, tokenizer), layout.text))
    if reason := unreadable(layout.windows(text, seed=dataset.seed), model):
        raise InputError(f"its tokenizer does not fit it: {reason}")
    return text


def random_tokens(model: nn.Module, layout: WindowLayout, count: int, *, seed: int) -> Tensor:
    """Rows of ordinary tokens, each as likely as any other: int64 (count, ``layout.text``)."""
    tokens = torch.arange(vocabulary_of(model))
    ordinary = tokens[~torch.isin(tokens, torch.tensor(layout.special, dtype=torch.int64))]
    return ordinary[Noise(seed, torch.device("cpu")).below(len(ordinary), count, layout.text)]


def padding_of(model: nn.Module) -> int:
    """The token that pads a sample; it is masked, and any will do where the model names none."""
    return int(getattr(getattr(model, "config", None), "pad_token_id", None) or 0)


def _samples(text: Tensor, layout: WindowLayout, pad: int) -> Windows:
    pieces = torch.split(text, PIECE, dim=1) if text.shape[1] >= 2 * PIECE else ()
    return Windows.joined(*(_padded(part, layout, pad) for part in (text, *pieces)))


def _padded(text: Tensor, layout: WindowLayout, pad: int) -> Windows:
    ids = layout.surround(text)
    missing = layout.length - ids.shape[1]
    seen = functional.pad(torch.ones_like(ids), (0, missing))
    ids = functional.pad(ids, (0, missing), value=pad)
    return Windows(ids, seen, torch.full_like(ids, UNSCORED))
