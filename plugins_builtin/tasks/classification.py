"""Classifiers: scores for the labels of a text, of each of its tokens, or of an image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from invarlock.api import FigureResult, Metric, VectorTask
from plugins_builtin.tasks.classes import is_in
from plugins_builtin.tasks.embedding import order

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass

DIFFERING = 0.10
"""Largest share of labels that differ, by the upper end of the interval: 0.034 where none of 108 samples does, which is
what 12 windows of 128 tokens hold, and 0.092 where four do. Labels of samples near a boundary change by rounding."""
IMAGES = 8
"""Images of a window: about as many samples as one of 128 tokens holds. 12 windows are 96, on which the exact interval
ends at 3.8 % where no label differs, and at 8.9 % where three do."""


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
    reads = frozenset({"text", "text_pair"})

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "SEQUENCE_CLASSIFICATION", ending="ForSequenceClassification")

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any) -> Any:
        from invarlock.api import column, columns_of, make_pairs

        columns = columns_of(documents)
        if "text_pair" in columns or model.config.num_labels == 1:
            return make_pairs(dataset, model, tokenizer, documents)
        return super().make_windows(model, dataset, tokenizer, column(documents, "text") if columns else None)

    def figures(self, before: Any, after: Any, judging: Any) -> Sequence[FigureResult]:
        found = super().figures(before, after, judging)
        return [*found, order("scores", before["labels"], after["labels"])] if before["labels"].shape[1] == 1 else found

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


class ImageClassification(_Classification):
    """The label of an image: ViT, ConvNeXt, ResNet."""

    name, made_up = "image classification", "random pixels"
    reads = frozenset({"image"})
    metric = Metric("label_disagreement", "share", limit=DIFFERING)

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "IMAGE_CLASSIFICATION", ending="ForImageClassification")

    def needs_tokenizer(self, dataset: Any) -> bool:
        return False

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any) -> Any:
        from invarlock.api import Windows, column, drawn
        from plugins_builtin.tasks.images import given_images, noise_images, size_of

        count = dataset.preview_n + dataset.final_n
        if documents is None:
            images = noise_images(model, IMAGES * count, size_of(model), seed=dataset.seed)
        else:
            files = column(drawn(documents, dataset, most=IMAGES), "image")
            images = given_images(model, files)["pixel_values"]
        windows = Windows.of_media({"pixel_values": images.to(next(model.parameters()).dtype)})
        preview = len(images) // count * dataset.preview_n
        return windows[:preview], windows[preview:]

    def vectors(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {"labels": model(**batch).logits}
