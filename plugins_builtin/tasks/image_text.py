"""Models of images and texts: a vector of each, and which belong together, as CLIP and SigLIP make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from invarlock.api import FigureResult, Metric, VectorTask
from plugins_builtin.tasks.classes import is_in
from plugins_builtin.tasks.embedding import MOVED, REORDERED, neighbours
from plugins_builtin.tasks.trying import CANNOT_READ, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass, WindowLayout, Windows

LEGACY_END = 2
"""``eos_token_id`` of CLIP checkpoints whose text vector is that of their last token by number."""


class ImageText(VectorTask):
    """The vectors of an image and of a text: CLIP, SigLIP."""

    name, made_up, made_up_media = "image-text", "random pixels and tokens", "random pixels"
    reads = frozenset({"image", "text"})
    metric = Metric("cosine_distance", "mean", limit=MOVED)
    towers = frozenset({"vision"})

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "ZERO_SHOT_IMAGE_CLASSIFICATION", ending="CLIPModel")

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any) -> Any:
        from invarlock.api import column, columns_of, drawn
        from plugins_builtin.tasks.image_inputs import images_of_files, random_images

        columns, size = columns_of(documents), dataset.preview_n + dataset.final_n
        self._check(model)
        if "image" in columns:
            documents = drawn(documents, dataset)
            images = images_of_files(model, column(documents, "image"))
            self.made_up_media = "" if "text" in columns else "random tokens"
        else:
            images = random_images(model, size, dataset.seed)
        texts = column(documents, "text") if "text" in columns else None
        text = _captions(model, dataset, tokenizer, texts, each="image" in columns)
        windows = replace(text, media=images)
        return windows[: dataset.preview_n], windows[dataset.preview_n :]

    def _check(self, model: Any) -> None:
        """:raises InputError: a random image and a token make no two vectors."""
        import torch

        from invarlock.api import device_of, evaluating
        from plugins_builtin.tasks.image_inputs import random_images

        device, one = device_of(model), torch.ones(1, 1, dtype=torch.int64)
        try:
            with evaluating(model):
                batch = {"input_ids": one, "attention_mask": one, **random_images(model, 1, seed=0)}
                self.vectors(model, {name: tensor.to(device) for name, tensor in batch.items()})
        except CANNOT_READ as error:
            raise refusal(model, self.name, error) from None

    def vectors(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        output = model(**batch)
        return {"images": output.image_embeds, "text": output.text_embeds}

    def figures(self, before: Any, after: Any, judging: Any) -> Sequence[FigureResult]:
        from invarlock.api import changed_matches

        matches = changed_matches(before, after, "text", "images")
        return [
            neighbours("images", before, after),
            neighbours("text", before, after),
            FigureResult.held("texts whose best image changed", matches, "%", REORDERED),
        ]


def _captions(model: Any, dataset: Any, tokenizer: Any, texts: Sequence[str] | None, *, each: bool) -> Windows:
    """Windows of text, of random tokens where there is none.

    :param each: every text is of a window; else they are cut into windows.
    """
    from invarlock.api import WindowLayout, context_of, encoded, padding_of, read_text, seen

    # Their text is a caption: few of them read as much as a window is by default.
    dataset = replace(dataset, seq_len=min(dataset.seq_len, context_of(model) or dataset.seq_len))
    layout = _ended(WindowLayout.of(model, tokenizer, task="causal", length=dataset.seq_len), model)
    if each and texts is not None:
        return encoded(texts, tokenizer, layout, padding_of(model))
    return seen(layout.surround(read_text(dataset, model, layout, tokenizer, texts)))


def _ended(layout: WindowLayout, model: Any) -> WindowLayout:
    """The layout with the end token, whose vector is that of the text, where the tokenizer puts none."""
    end = getattr(model.config.text_config, "eos_token_id", None)
    if not isinstance(end, int):
        return layout
    last = model.config.text_config.vocab_size - 1
    end = last if end == LEGACY_END else end
    return layout.ended(end)
