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
from plugins_builtin.tasks.trying import CANNOT_READ, refusal

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass, Windows


class VisionLanguage(LanguageTask):
    """The next token of a text, in every other window after an image: LLaVA, Qwen2-VL."""

    name, predicted = "vision-language", "causal"
    metric = Metric("perplexity", "ratio")
    made_up, made_up_media = "random pixels, and text that the baseline writes", "random pixels"
    reads = frozenset({"image", "text"})
    towers = frozenset({"vision"})

    def owns(self, model_class: ModelClass) -> bool:
        listed = is_in(model_class, "IMAGE_TEXT_TO_TEXT", ending="ForImageTextToText")
        return listed and not model_class.encoder_decoder

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
        """An image for each window; None where the model is known to take them otherwise, by trying one.

        :raises InputError: the model does not read text alone, either.
        """
        import torch

        from invarlock.api import Windows, device_of, evaluating
        from plugins_builtin.tasks.image_inputs import images_of_files, random_images

        text = torch.ones(2, 1, dtype=torch.int64)
        try:
            with evaluating(model):
                count = dataset.preview_n + dataset.final_n
                media = random_images(model, count, dataset.seed) if files is None else images_of_files(model, files)
                images = _Images.of(model, media)
                tried = images[:2].beside(Windows(text, text, text)[:count])
                model(**tried.inputs(device_of(model)))
        except CANNOT_READ:
            self._check_text_alone(model)
            self.towers, self.made_up, self.made_up_media = frozenset(), "", ""
            return None
        finally:
            _forget(model)
        return images

    def _check_text_alone(self, model: Any) -> None:
        import torch

        from invarlock.api import device_of, evaluating

        try:
            with evaluating(model):
                one = torch.ones(1, 1, dtype=torch.int64, device=device_of(model))
                model(input_ids=one, attention_mask=one)
        except CANNOT_READ as error:
            raise refusal(model, self.name, error) from None


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
    in_text: bool
    """False where layers look at the image besides: they take one for each text of a batch."""

    @classmethod
    def of(cls, model: Any, media: Mapping[str, Tensor]) -> _Images:
        config, arguments = model.config, inspect.signature(model.forward).parameters
        length = cls._length(model, media)
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id")
        start, image, end, film = (getattr(config, name, None) for name in names)
        image = config.image_token_index if image is None else image
        tokens, reserved = [start, *[image] * length, end], (start, image, end, film)
        kept, taken = (tuple(token for token in each if token is not None) for each in (tokens, reserved))
        in_text = hasattr(model, "get_image_features")
        return cls(media, kept, image, taken, "mm_token_type_ids" in arguments, in_text)

    @staticmethod
    def _length(model: Any, media: Mapping[str, Tensor]) -> int:
        """Number of tokens that stand for an image: as many as it has features, or one where layers look at it."""
        from invarlock.api import device_of
        from plugins_builtin.tasks.image_inputs import first_of

        if not hasattr(model, "get_image_features"):
            return 1
        features = model.get_image_features(**first_of(media, device_of(model)))
        return len(getattr(features, "pooler_output", features)[0])

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

        illustrated = (torch.arange(len(text)) % 2 == 0) | (not self.in_text)
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
