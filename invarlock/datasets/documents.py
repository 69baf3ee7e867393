"""The documents of a dataset, in the order in which they are read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from invarlock.core.errors import UsageError


class Dataset(Protocol):
    """The section ``dataset`` of a configuration; ``seq_len`` and ``stride`` count tokens, the others say windows."""

    @property
    def provider(self) -> str: ...
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


def shuffled(documents: Sequence[str], dataset: Dataset, generator: torch.Generator) -> Iterator[str]:
    """Those that hold text, in an order that the generator draws; none is read before it is its turn.

    :raises UsageError: none of them holds text.
    """
    blank = True
    for row in torch.randperm(len(documents), generator=generator).tolist():
        if (text := documents[row]).strip():
            blank = False
            yield text
    if blank:
        raise UsageError(f"dataset: provider {dataset.provider} holds no text")
