"""From a dataset to windows: disjoint ones for the guards (preview) and for the metric (final)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import Protocol, TypeVar

import torch
from torch import nn

from invarlock.core.errors import InputError, UsageError
from invarlock.datasets.conversations import ChatTemplate
from invarlock.datasets.generated import write_text
from invarlock.datasets.layout import Tokenizer, WindowLayout, Windows, encode
from invarlock.models.facts import Predicted, context_of, vocabulary_of

PIECE = 2**16
"""Characters that are tokenized at once."""
SHARE = 4
"""One window in so many is a conversation, and one of each part at least: enough for the tokens between turns to show,
while plain text, which does not depend on a template, decides."""

Token = TypeVar("Token")


class TooLittleText(UsageError):
    """The text is not enough for the windows of a dataset.

    :ivar windows: number of windows that it is enough for.
    """

    def __init__(self, dataset: Dataset, windows: int) -> None:
        self.windows = windows
        super().__init__(
            f"dataset.path: the text is enough for {windows} windows of {dataset.seq_len} tokens, "
            f"{dataset.preview_n + dataset.final_n} are asked for: give more text, or lower dataset.preview_n "
            f"({dataset.preview_n}), dataset.final_n ({dataset.final_n}) or dataset.seq_len"
        )


class Dataset(Protocol):
    """The section ``dataset`` of a configuration; ``seq_len`` and ``stride`` count tokens, the others say windows."""

    @property
    def provider(self) -> str: ...
    @property
    def is_generated(self) -> bool: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def stride(self) -> int | None: ...
    @property
    def preview_n(self) -> int: ...
    @property
    def final_n(self) -> int: ...
    @property
    def seed(self) -> int: ...


def make_windows(
    dataset: Dataset,
    model: nn.Module,
    tokenizer: Tokenizer | None,
    *,
    task: Predicted,
    documents: Sequence[str] | None = None,
    chat: ChatTemplate | None = None,
) -> tuple[Windows, Windows]:
    """The preview windows and the final windows of a dataset; none of their text overlaps.

    The same dataset, seed, tokenizer and model give the same windows.

    :param tokenizer: the model's own; None only where there are no documents and the model is causal.
    :param documents: the text of the dataset; None lets the model write its own.
    :param chat: renders the text of some windows as conversations.
    :returns: ``dataset.preview_n`` and ``dataset.final_n`` windows of at most ``dataset.seq_len`` tokens.
    :raises UsageError: the windows do not fit the model, or there is too little text for them.
    """
    check_lengths(dataset, model)
    layout = WindowLayout.of(model, tokenizer, task=task, length=dataset.seq_len)
    wanted = dataset.preview_n + dataset.final_n
    numbers: list[int] = []
    if documents is None:
        text = write_text(model, layout, wanted, seed=dataset.seed)
    elif tokenizer is None:
        raise InputError("it has no tokenizer to read text with; dataset.provider generated needs none")
    else:
        rows, numbers = _read(documents, dataset, partial(tokens_of, tokenizer), layout.text)
        if chat is not None:
            for place in conversation_places(dataset):
                rows[place] = _beginning(encode(tokenizer, chat.conversation(rows[place], layout.text)), layout.text)
        text = torch.tensor(rows)
    windows = replace(layout.windows(text, seed=dataset.seed), documents=torch.tensor(numbers) if numbers else None)
    if reason := unreadable(windows, model):
        raise InputError(f"its tokenizer does not fit it: {reason}")
    return windows[: dataset.preview_n], windows[dataset.preview_n :]


def conversation_places(dataset: Dataset) -> list[int]:
    """Numbers of the windows that are conversations where a chat template renders them; the preview ones come first."""
    count = dataset.preview_n + dataset.final_n
    return [*range(0, dataset.preview_n, SHARE), *range(dataset.preview_n, count, SHARE)]


def check_lengths(dataset: Dataset, model: nn.Module) -> None:
    """Check the lengths of a dataset's windows.

    :raises UsageError: they do not fit the model.
    """
    if dataset.stride is not None and dataset.stride < dataset.seq_len:
        raise UsageError(
            f"dataset.stride: {dataset.stride} is less than dataset.seq_len ({dataset.seq_len}): windows would overlap"
        )
    context = context_of(model)
    if context is not None and dataset.seq_len > context:
        raise UsageError(f"dataset.seq_len: {dataset.seq_len} is more than the {context} tokens that the model reads")


def unreadable(windows: Windows, model: nn.Module) -> str | None:
    """Reason why a model cannot read windows that were made for another one, or None."""
    largest, known = int(windows.input_ids.max()), vocabulary_of(model)
    if largest >= known:
        return f"the windows hold token {largest}, and the model knows only {known} tokens"
    context = context_of(model)
    if context is not None and windows.input_ids.shape[1] > context:
        return f"the windows are {windows.input_ids.shape[1]} tokens long, and the model reads only {context}"
    return None


def read_rows(
    documents: Sequence[str], dataset: Dataset, split: Callable[[str], Iterator[Token]], length: int
) -> list[list[Token]]:
    """The text of each window of a dataset, read no further than needed and shuffled.

    :param split: splits a document into tokens.
    :param length: tokens of text in a window.
    :raises TooLittleText: there is not enough for all windows.
    """
    rows, _ = _read(documents, dataset, split, length)
    return rows


def _read(
    documents: Sequence[str], dataset: Dataset, split: Callable[[str], Iterator[Token]], length: int
) -> tuple[list[list[Token]], list[int]]:
    """The text of each window, and the number of the document that it ends in."""
    generator, wanted = torch.Generator().manual_seed(dataset.seed), dataset.preview_n + dataset.final_n
    skipped = 0 if dataset.stride is None else dataset.stride - dataset.seq_len
    begun = 0

    def counting(document: str) -> Iterator[Token]:
        nonlocal begun
        begun += 1
        return split(document)

    tokens = read_tokens(documents, dataset, counting, generator)
    rows: list[list[Token]] = []
    numbers: list[int] = []
    for row in islice(_cut(tokens, length, skipped=skipped), wanted):
        rows.append(row)
        numbers.append(begun)
    if len(rows) < wanted:
        raise TooLittleText(dataset, len(rows))
    order = torch.randperm(wanted, generator=generator).tolist()
    return [rows[place] for place in order], [numbers[place] for place in order]


def read_tokens(
    documents: Sequence[str], dataset: Dataset, split: Callable[[str], Iterator[Token]], generator: torch.Generator
) -> Iterator[Token]:
    """One stream of the tokens of all documents, in an order that the generator draws."""
    return chain.from_iterable(map(split, _shuffled(documents, dataset, generator)))


def _shuffled(documents: Sequence[str], dataset: Dataset, generator: torch.Generator) -> Iterator[str]:
    """Documents that hold text, in an order that the generator draws; none is read before its turn."""
    blank = True
    for row in torch.randperm(len(documents), generator=generator).tolist():
        if (text := documents[row]).strip():
            blank = False
            yield text
    if blank:
        raise UsageError(f"dataset: provider {dataset.provider} returned no text")


def _cut(tokens: Iterator[Token], length: int, *, skipped: int) -> Iterator[list[Token]]:
    while len(row := list(islice(tokens, length))) == length:
        yield row
        next(islice(tokens, skipped, skipped), None)


def _beginning(tokens: list[int], length: int) -> list[int]:
    if len(tokens) < length:
        raise UsageError(f"a conversation has {len(tokens)} tokens, and a window {length}")
    return tokens[:length]


def tokens_of(tokenizer: Tokenizer, text: str) -> Iterator[int]:
    """The tokens of a document, which ends with the end-of-text token, if there is one."""
    for piece in pieces(text):
        yield from encode(tokenizer, piece)
    if tokenizer.eos_token_id is not None:
        yield tokenizer.eos_token_id


def pieces(text: str) -> Iterator[str]:
    """A document in pieces that end with a line, so that a few windows do not take all of a long one to tokenize."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end
