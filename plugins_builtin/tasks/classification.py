"""Classifiers: scores for the labels of a text, or of each of its tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from invarlock.api import FigureResult, Metric, VectorTask
from plugins_builtin.tasks.classes import is_in

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass

DIFFERING = 0.10
"""Largest share of labels that differ, by the upper end of the interval: 0.034 where none of 108 samples does, which is
what 12 windows of 128 tokens hold, and 0.092 where four do. Labels of samples near a boundary change by rounding."""


class _Classification(VectorTask):
    def differences(self, before: Any, after: Any) -> Any:
        from invarlock.api import changed_labels

        return changed_labels(before["labels"], after["labels"])

    def figures(self, before: Any, after: Any, judging: Any) -> Sequence[FigureResult]:
        """The divergence of the labels, limited as the rise of a language model's log loss is."""
        from invarlock.api import label_divergence

        divergence = label_divergence(before["labels"], after["labels"])
        limit = math.log(judging.ratio)
        return [
            FigureResult.held("KL divergence of the labels", divergence, "nats", limit, rejects=not judging.improving)
        ]


class SequenceClassification(_Classification):
    """The label of a text: sentiment, topic, entailment; or the one score that a reranker gives it."""

    name = "sequence classification"
    metric = Metric("label_disagreement", "share", limit=DIFFERING)

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "SEQUENCE_CLASSIFICATION", ending="ForSequenceClassification")

    def vectors(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"labels": model(**batch).logits}


class TokenClassification(_Classification):
    """The label of each token of a text: names, parts of speech."""

    name = "token classification"
    # Tokens of one text depend on each other: the interval is over windows.
    metric = Metric("label_disagreement", "mean", limit=DIFFERING)

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "TOKEN_CLASSIFICATION", ending="ForTokenClassification")

    def vectors(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"labels": model(**batch).logits[batch["attention_mask"].bool()]}

    def counts(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["attention_mask"].sum(dim=1)
