"""The output head set aside, so that logits of many tokens need never be in memory together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.errors import UsageError
from invarlock.evaluation.models import LOGITS_BYTES

CHANGED_AFTERWARDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier")
"""Settings by which a model's forward changes what its head gives."""


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head with its weights in memory: (vocabulary, features) and, if it has one, (vocabulary,)."""

    weight: Tensor
    bias: Tensor | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of hidden states (tokens, features)."""
        return functional.linear(hidden, self.weight, self.bias)

    @property
    def tokens(self) -> int:
        """How many tokens' logits take ``LOGITS_BYTES`` in float32."""
        return max(1, LOGITS_BYTES // (4 * len(self.weight)))


@contextmanager
def set_aside_head(model: nn.Module) -> Iterator[Head]:
    """Let the model give, in the place of logits, what its head would make them of.

    :raises UsageError: it has no head, or its logits are not just what the head gives.
    """
    get = getattr(model, "get_output_embeddings", None)
    module = get() if callable(get) else None
    config = getattr(model, "config", None)
    changed = [name for name in CHANGED_AFTERWARDS if getattr(config, name, None)]
    if not isinstance(module, nn.Linear) or changed:
        why = f"its configuration sets {changed[0]}" if changed else "it has no linear output head"
        raise UsageError(f"model.id: its outputs cannot be measured while it is streamed: {why}")
    # Cloned, because any operation on streamed weights reads them.
    head = Head(module.weight.clone(), None if module.bias is None else module.bias.clone())
    module.forward = _unchanged  # type: ignore[method-assign, assignment]
    try:
        yield head
    finally:
        del module.forward


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden
