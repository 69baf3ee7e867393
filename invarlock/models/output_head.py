"""The output head set aside, so that logits of many tokens need never be in memory together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.errors import UsageError
from invarlock.models.facts import LOGITS_BYTES
from invarlock.models.structure import output_head

UNMEASURED = "model.id: its outputs cannot be measured while it is streamed"


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head with its weights in memory: (vocabulary, features) and, if it has one, (vocabulary,)."""

    weight: Tensor
    bias: Tensor | None
    given: list[Tensor]
    """Hidden states that the model passed to its head, one tensor per call."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of hidden states (tokens, features)."""
        return functional.linear(hidden, self.weight, self.bias)

    @property
    def tokens(self) -> int:
        """Number of tokens whose logits take ``LOGITS_BYTES`` in float32."""
        return max(1, LOGITS_BYTES // (4 * len(self.weight)))

    def check(self, instead: Tensor) -> None:
        """Refuse a model that changes the logits of its head.

        :param instead: the model's output in place of logits.
        :raises UsageError: it differs from the input of the head.
        """
        if len(self.given) != 1 or not torch.equal(instead, self.given[0].to(instead.dtype)):
            raise UsageError(f"{UNMEASURED}: it changes its head's logits")


@contextmanager
def set_aside_head(model: nn.Module) -> Iterator[Head]:
    """Let the model output the input of its head in place of logits.

    :raises UsageError: it has no linear head.
    """
    module = output_head(model)
    if not isinstance(module, nn.Linear):
        raise UsageError(f"{UNMEASURED}: it has no linear output head")
    # Cloned, because any operation on streamed weights reads them.
    head = Head(module.weight.clone(), None if module.bias is None else module.bias.clone(), [])

    def unchanged(hidden: Tensor) -> Tensor:
        head.given.append(hidden)
        return hidden

    module.forward = unchanged  # type: ignore[method-assign, assignment]
    try:
        yield head
    finally:
        del module.forward
