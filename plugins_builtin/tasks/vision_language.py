"""Vision-language models: the next token of a text, after an image and alone, as LLaVA and Qwen-VL read it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.api import LanguageTask, Metric
from plugins_builtin.tasks.classes import is_in

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass, Windows

SIDE = 8
"""Patches along each side of a random image whose size the model leaves open, before they are merged; one that is given
has twice as many."""
CANNOT_SEE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""Exceptions of a model that takes its images otherwise."""


class VisionLanguage(LanguageTask):
    """The next token of a text, in every other window after an image: LLaVA, Qwen2-VL."""

    name, predicted = "vision-language", "causal"
    metric = Metric("perplexity", "ratio")
    made_up, made_up_media = "random pixels, and text that the baseline writes", "random pixels"
    reads = frozenset({"image", "text"})
    towers = frozenset({"vision"})

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "IMAGE_TEXT_TO_TEXT", ending="ForImageTextToText")

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any, **how: Any) -> Any:
        """Windows of text, every other one after an image; none where no image can be made, which coverage tells."""
        from invarlock.api import Windows, column, columns_of, context_of, drawn

        columns = columns_of(documents)
        has_images, has_text = "image" in columns, "text" in columns
        documents = drawn(documents, dataset) if has_images else documents
        texts = column(documents, "text") if has_text else None
        images = self._images(model, dataset, column(documents, "image") if has_images else None)
        if images is None:
            return super().make_windows(model, dataset, tokenizer, texts, **how)
        if has_images:
            self.made_up_media = "" if has_text else "text that the baseline writes"
        room = (context_of(model) or math.inf) - images.length
        text = replace(dataset, seq_len=int(min(dataset.seq_len, max(room, 0))))
        if has_images and texts is not None:
            windows = _captions(model, text, tokenizer, texts)
        else:
            windows = Windows.joined(*super().make_windows(model, text, tokenizer, texts, **how))
        preview, final = slice(dataset.preview_n), slice(dataset.preview_n, None)
        return images[preview].beside(windows[preview]), images[final].beside(windows[final])

    def _images(self, model: Any, dataset: Any, files: Sequence[Path] | None) -> _Images | None:
        """An image for each window; None where the model is known to take them otherwise, by trying one."""
        import torch

        from invarlock.api import Windows, device_of, evaluating

        text = torch.ones(2, 1, dtype=torch.int64)
        try:
            with evaluating(model):
                count = dataset.preview_n + dataset.final_n
                media = random_images(model, count, dataset.seed) if files is None else _given(model, files)
                images = _Images.of(model, media)
                tried = images[:2].beside(Windows(text, text, text)[:count])
                model(**tried.inputs(device_of(model)))
        except CANNOT_SEE:
            self.towers, self.made_up, self.made_up_media = frozenset(), "", ""
            return None
        finally:
            _forget(model)
        return images


def _captions(model: Any, dataset: Any, tokenizer: Any, texts: Sequence[str]) -> Windows:
    """Windows of the text of each image, of which all but special tokens are scored."""
    import torch

    from invarlock.api import UNSCORED, WindowLayout, encoded, padding_of

    layout = WindowLayout.of(model, tokenizer, task="causal", length=dataset.seq_len)
    windows = encoded(texts, tokenizer, layout, padding_of(model)).trimmed()
    left = (windows.attention_mask == 0) | torch.isin(windows.input_ids, torch.tensor(layout.special))
    return replace(windows, labels=windows.input_ids.masked_fill(left, UNSCORED))


def _forget(model: Any) -> None:
    """Qwen-VL keeps by how much an image has shifted the positions of the text, and text alone is then misplaced."""
    for module in model.modules():
        if getattr(module, "rope_deltas", None) is not None:
            module.rope_deltas = None


@dataclass(frozen=True, eq=False)
class _Images:
    """Images, one for each window, and the tokens that stand for one in the text."""

    media: Mapping[str, Tensor]
    tokens: tuple[int, ...]
    image_token: int
    reserved: tuple[int, ...]
    """Tokens of images and films, which no text may have."""
    types: bool
    """True if the model is told which tokens are of an image."""

    @classmethod
    def of(cls, model: Any, media: Mapping[str, Tensor]) -> _Images:
        from invarlock.api import device_of

        config, arguments = model.config, inspect.signature(model.forward).parameters
        features = model.get_image_features(**first_of(media, device_of(model)))
        length = len(getattr(features, "pooler_output", features)[0])
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
        start, image, end, film = (getattr(config, name, None) for name in names)
        image = config.image_token_index if image is None else image
        tokens, reserved = [start, *[image] * length, end], (start, image, end, film)
        kept, taken = (tuple(token for token in each if token is not None) for each in (tokens, reserved))
        return cls(media, kept, image, taken, "mm_token_type_ids" in arguments)

    @property
    def plain(self) -> int:
        """A token that is of no image."""
        return next(token for token in count() if token not in self.reserved)

    @property
    def length(self) -> int:
        return len(self.tokens)

    def __getitem__(self, rows: slice) -> _Images:
        return replace(self, media={name: tensor[rows] for name, tensor in self.media.items()})

    def beside(self, text: Windows) -> Windows:
        """Windows of the text, every other one after an image, the rest padded to the same length.

        A server reads both, and damage may show in either alone.
        """
        import torch

        from invarlock.api import UNSCORED, Windows

        illustrated = torch.arange(len(text)) % 2 == 0
        image = torch.tensor(self.tokens).expand(len(text), -1)

        def placed(before: Tensor, tokens: Tensor, after: Tensor) -> Tensor:
            rows = torch.cat([before, tokens], dim=1), torch.cat([tokens, after], dim=1)
            return torch.where(illustrated.unsqueeze(1), *rows)

        # What the baseline writes may hold the token of an image that is not there.
        written, wanted = (
            torch.where(torch.isin(each, torch.tensor(self.reserved)), self.plain, each)
            for each in (text.input_ids, text.labels)
        )
        unscored = torch.full_like(image, UNSCORED)
        ids = placed(image, written, torch.full_like(image, self.plain))
        seen = placed(torch.ones_like(image), text.attention_mask, torch.zeros_like(image))
        types = {"mm_token_type_ids": (ids == self.image_token).int()} if self.types else {}
        labels = placed(unscored, wanted, unscored)
        return Windows(ids, seen, labels, media={**self.media, **types}, illustrated=illustrated)


def _takes_patches(model: Any) -> bool:
    """True for a model that reads images of any size, cut into patches."""
    return "image_grid_thw" in inspect.signature(model.forward).parameters


def random_images(model: Any, count: int, seed: int) -> dict[str, Tensor]:
    """Arguments of a model's forward that are random images, each (count, ...)."""
    return (_patches if _takes_patches(model) else _whole)(model, count, seed)


def first_of(media: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """The first image as the tower of a model takes it."""
    first = {name: tensor[:1].to(device) for name, tensor in media.items()}
    # Patches of all images stand in one row.
    return first | ({"pixel_values": first["pixel_values"].flatten(0, 1)} if "image_grid_thw" in first else {})


def _given(model: Any, files: Sequence[Path]) -> dict[str, Tensor]:
    """Images of files as a model takes them: of one size, so that each has as many patches."""
    from plugins_builtin.tasks.images import given_images

    patches = _takes_patches(model)
    media = given_images(model, files, side=2 * SIDE * model.config.vision_config.patch_size if patches else None)
    pixels = media["pixel_values"].to(next(model.parameters()).dtype)
    if not patches:
        return {"pixel_values": pixels}
    rows = pixels.view(len(files), -1, pixels.shape[-1])
    return {"pixel_values": rows, "image_grid_thw": media["image_grid_thw"]}


def _whole(model: Any, images: int, seed: int) -> dict[str, Tensor]:
    """Images of the one size that a model reads."""
    from plugins_builtin.tasks.images import noise_images

    side = model.config.vision_config.image_size
    return {"pixel_values": noise_images(model, images, (side, side), seed=seed).to(next(model.parameters()).dtype)}


def _patches(model: Any, images: int, seed: int) -> dict[str, Tensor]:
    """Images of any size, cut into patches, each a row of numbers; and how many there are in time, height and width."""
    import torch
    from torch.nn import functional

    from plugins_builtin.tasks.images import noise_images

    vision = model.config.vision_config
    pixels = noise_images(model, images, (SIDE * vision.patch_size, SIDE * vision.patch_size), seed=seed)
    rows = functional.unfold(pixels, vision.patch_size, stride=vision.patch_size).transpose(1, 2)
    # A still image is a film of as many frames as a patch takes.
    rows = rows.repeat(1, 1, vision.temporal_patch_size).to(next(model.parameters()).dtype)
    return {"pixel_values": rows, "image_grid_thw": torch.tensor([[1, SIDE, SIDE]]).expand(images, -1)}
