"""Samples of models that read a text as a whole: several of one window's text, from a few tokens to all of them.

A model that makes one vector of a text says little of a window: so its text is read whole, and once more in short
pieces, as queries and labelled sentences are short. All pieces together are as long as the window.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from invarlock.core.errors import InputError
from invarlock.datasets.layout import UNSCORED, Tokenizer, WindowLayout, Windows, encode
from invarlock.datasets.noise import Noise
from invarlock.datasets.windows import Dataset, check_lengths, read_rows, tokens_of, unreadable
from invarlock.models.facts import vocabulary_of

PIECE = 16
"""Tokens of a short sample: a sentence or a query. 12 windows of 128 tokens then hold 108 samples, on which the exact
interval of a share of labels that differ ends at 3.4 % where none does."""

NO_TOKENIZER = "it has no tokenizer to read text with; dataset.provider generated needs none"


def make_samples(
    dataset: Dataset, model: nn.Module, tokenizer: Tokenizer | None, documents: Sequence[str] | None
) -> tuple[Windows, Windows]:
    """The preview samples and the final ones of a dataset, padded on the right; sample i is of window i modulo their
    number.

    :param documents: the text of the dataset; None for random tokens.
    :raises UsageError: the windows do not fit the model, or there is too little text for them.
    """
    layout = WindowLayout.of(model, tokenizer, task="causal", length=dataset.seq_len)
    end = getattr(model.config, "eos_token_id", None)
    if getattr(model.config, "is_encoder_decoder", False) and isinstance(end, int):
        # The label of BART is read at the end token, and at no other.
        layout = layout.ended(end)
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
        raise InputError(NO_TOKENIZER)
    text = torch.tensor(read_rows(documents, dataset, partial(tokens_of, tokenizer), layout.text))
    if reason := unreadable(layout.windows(text, seed=dataset.seed), model):
        raise InputError(f"its tokenizer does not fit it: {reason}")
    return text


def encoded(texts: Sequence[str], tokenizer: Tokenizer | None, layout: WindowLayout, pad: int) -> Windows:
    """A window of each text, cut to its layout and padded on the right.

    :raises InputError: there is no tokenizer.
    """
    if tokenizer is None:
        raise InputError(NO_TOKENIZER)
    return padded([encode(tokenizer, text)[: layout.text] for text in texts], layout, pad)


def padded(rows: Sequence[Sequence[int]], layout: WindowLayout, pad: int) -> Windows:
    """Windows of rows of text tokens, between special tokens and padded on the right."""
    whole = [[*layout.prefix, *row, *layout.suffix] for row in rows]
    ids = torch.tensor([[*row, *[pad] * (layout.length - len(row))] for row in whole], dtype=torch.int64)
    lengths = torch.tensor([len(row) for row in whole])
    mask = (torch.arange(layout.length) < lengths.unsqueeze(1)).long()
    return Windows(ids, mask, torch.full_like(ids, UNSCORED))


def seen(ids: Tensor) -> Windows:
    """Windows of tokens that are all seen, and of which none is scored."""
    return Windows(ids, torch.ones_like(ids), torch.full_like(ids, UNSCORED))


def random_tokens(model: nn.Module, layout: WindowLayout, count: int, *, seed: int) -> Tensor:
    """Rows of ordinary tokens, each as likely as any other: int64 (count, ``layout.text``)."""
    tokens = torch.arange(vocabulary_of(model))
    ordinary = tokens[~torch.isin(tokens, torch.tensor(layout.special, dtype=torch.int64))]
    return ordinary[Noise(seed, torch.device("cpu")).below(len(ordinary), count, layout.text)]


def padding_of(model: nn.Module) -> int:
    """The token that pads a sample; it is masked, and any will do where the model names none."""
    return int(getattr(getattr(model, "config", None), "pad_token_id", None) or 0)


def _samples(text: Tensor, layout: WindowLayout, pad: int) -> Windows:
    return Windows.joined(*(padded(part.tolist(), layout, pad) for part in split(text)))


def split(text: Tensor) -> Sequence[Tensor]:
    """The text of windows whole, and in short pieces where it is long enough for two."""
    return text, *(torch.split(text, PIECE, dim=1) if text.shape[1] >= 2 * PIECE else ())
