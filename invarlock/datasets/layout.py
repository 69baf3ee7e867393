"""Places of tokens in a window, and which of them are scored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.core.errors import InputError, UsageError
from invarlock.models.facts import Predicted

UNSCORED = -100
PATCH = 16
"""Side of a patch of an image that costs about as much as a token: that of most vision transformers."""
MASKED_SHARE = 0.15


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used."""

    eos_token_id: int | None
    mask_token_id: int | None

    @property
    def all_special_ids(self) -> list[int]: ...

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]: ...


def encode(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    """The token ids of a text of any length, by default without the special tokens around it."""
    # verbose=False: a text longer than the model's context is no mistake here, it is cut into windows.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


@dataclass(frozen=True, eq=False)
class Windows:
    """Windows of equal length, one per row: int64 tensors on the CPU.

    ``input_ids`` and ``attention_mask`` are (n, length). ``labels`` holds the token to predict, or -100 where nothing
    is scored; it is (n, length), and not shifted: a causal model's logits at i predict the label at i + 1. For
    seq2seq, ``labels`` and ``decoder_input_ids`` have a length of their own.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    decoder_input_ids: Tensor | None = None
    media: Mapping[str, Tensor] = field(default_factory=dict)
    """Further arguments of the model's forward, each (n, ...): images or sounds, types of tokens."""
    documents: Tensor | None = None
    """Number of the document that the text of each ends in, int64 (n,), where it was read."""
    illustrated: Tensor | None = None
    """True for each window that has an image, bool (n,), where others are text alone; None if all are alike."""

    @classmethod
    def of_media(cls, media: Mapping[str, Tensor]) -> Windows:
        """Windows without text, whose tensors of tokens have no columns."""
        none = torch.zeros(len(next(iter(media.values()))), 0, dtype=torch.int64)
        return cls(none, none, none, media=media)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def length(self) -> int:
        """Tokens of a window, of the source or of the target, frames of its sound or patches of its image: the most."""
        sound, image = (self.media.get(name, self.labels) for name in ("input_features", "pixel_values"))
        # One image, or several tiles of it.
        patches = math.prod(image.shape[1:-3] + image.shape[-2:]) // PATCH**2 if image.ndim >= 4 else 0
        return max(1, self.input_ids.shape[1], self.labels.shape[1], sound.shape[-1], patches)

    def __getitem__(self, rows: slice) -> Windows:
        return self._of({name: tensor[rows] for name, tensor in self._tensors().items()})

    @classmethod
    def joined(cls, *parts: Windows) -> Windows:
        """Windows of the same layout, one after the other."""
        tensors = [part._tensors() for part in parts]
        return parts[0]._of({name: torch.cat([each[name] for each in tensors]) for name in tensors[0]})

    def batches(self, size: int) -> Iterator[Windows]:
        """The windows in order, ``size`` at a time; the last batch may be smaller."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The keyword arguments of the model's forward, on a device."""
        # A model that hears reads the tokens of its decoder, and no others.
        left = {"labels", "documents", "illustrated", *self.media}
        left |= {"input_ids", "attention_mask"} if "input_features" in self.media else set()
        tokens = {name: tensor for name, tensor in self._tensors().items() if name not in left and tensor.shape[1]}
        return {name: tensor.to(device) for name, tensor in (tokens | self.shown()).items()}

    def shown(self) -> dict[str, Tensor]:
        """The media as the model's forward takes them: no images of windows that are text alone."""
        shown = dict(self.media)
        if self.illustrated is not None:
            of_tokens = {name: each for name, each in shown.items() if each.shape == self.input_ids.shape}
            images = {name: each[self.illustrated] for name, each in shown.items() if name not in of_tokens}
            shown = of_tokens | (images if self.illustrated.any() else {})
        if "image_grid_thw" in shown:
            # Patches of all images stand in one row.
            shown["pixel_values"] = shown["pixel_values"].flatten(0, 1)
        return shown

    def trimmed(self) -> Windows:
        """Without the padding on the right that all of the windows share."""
        seen = self.attention_mask.any(dim=0).nonzero()
        return self.cut(int(seen.max()) + 1 if len(seen) else 0)

    def cut(self, tokens: int) -> Windows:
        """The first tokens of each; images, sounds and what has a length of its own stay whole."""
        tensors, shape = self._tensors(), self.input_ids.shape
        return self._of({name: each[:, :tokens] if each.shape == shape else each for name, each in tensors.items()})

    def equal(self, other: Windows) -> bool:
        """Compare all tensors; those of different shapes differ."""
        here, there = self._tensors(), other._tensors()
        return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)

    def _tensors(self) -> dict[str, Tensor]:
        own = {name: tensor for name, tensor in vars(self).items() if name != "media" and tensor is not None}
        return {**own, **self.media}

    def _of(self, tensors: Mapping[str, Tensor]) -> Windows:
        """Windows of other rows."""
        own = {name: tensor for name, tensor in tensors.items() if name not in self.media}
        return Windows(**own, media={name: tensors[name] for name in self.media})


@dataclass(frozen=True)
class WindowLayout:
    """Layout of a window of ``length`` tokens: text between the tokenizer's special tokens.

    Special tokens are never scored. ``mask``, the mask token, is there for masked models only; ``start``, what the
    decoder reads first, for seq2seq models only.
    """

    length: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    special: tuple[int, ...] = ()
    mask: int | None = None
    start: int | None = None

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Tokenizer | None, *, task: Predicted, length: int) -> WindowLayout:
        """The layout that fits a model and its tokenizer; without a tokenizer there are no special tokens.

        :param length: tokens in a window, special tokens included (``dataset.seq_len``).
        :raises UsageError: the window is too short, or a token that the task needs does not exist.
        """
        prefix, suffix = surrounding(tokenizer) if tokenizer else ((), ())
        layout = cls(
            length,
            prefix,
            suffix,
            special=_special_of(tokenizer) if tokenizer else (),
            mask=_mask_of(tokenizer) if task == "masked" else None,
            start=_start_of(model) if task == "seq2seq" else None,
        )
        if layout.text < 2:
            raise UsageError(f"dataset.seq_len: {length} leaves less than two tokens beside the special ones; raise it")
        return layout

    def ended(self, end: int) -> WindowLayout:
        """The layout with a token at the end where the tokenizer puts none: some models read all there."""
        special = tuple(sorted({*self.special, end}))
        return self if self.suffix else replace(self, suffix=(end,), special=special)

    @property
    def text(self) -> int:
        """Number of text tokens in a window; for seq2seq the first half is the source, the second the target."""
        around = len(self.prefix) + len(self.suffix)
        return self.length - around if self.start is None else 2 * (self.length // 2 - around)

    def surround(self, text: Tensor) -> Tensor:
        """Rows of text, int64 (n, any), with the special tokens before and after each."""
        before, after = (text.new_tensor(tokens).expand(len(text), -1) for tokens in (self.prefix, self.suffix))
        return torch.cat([before, text, after], dim=1)

    def windows(self, text: Tensor, *, seed: int) -> Windows:
        """Make windows of rows of text.

        :param text: int64 (n, ``layout.text``).
        :param seed: of the masks; the same seed masks the same tokens.
        """
        if self.start is not None:
            source, target = text.chunk(2, dim=1)
            return _all_seen(self.surround(source), self._labels(target), self.late(self.surround(target)))
        whole = self.surround(text)
        if self.mask is not None:
            hidden = self._hidden(whole, torch.Generator().manual_seed(seed))
            return _all_seen(whole.masked_fill(hidden, self.mask), whole.masked_fill(~hidden, UNSCORED))
        return _all_seen(whole, self._labels(text))

    def late(self, target: Tensor) -> Tensor:
        """Teacher forcing: the decoder reads the target one step late, after its start token."""
        return functional.pad(target[:, :-1], (1, 0), value=self.start)

    def _labels(self, text: Tensor) -> Tensor:
        return functional.pad(text, (len(self.prefix), len(self.suffix)), value=UNSCORED)

    def _hidden(self, tokens: Tensor, generator: torch.Generator) -> Tensor:
        """Mask of the tokens to hide: 15 % of each row's ordinary ones, at least one (Devlin et al. 2019, section 3.1).

        All of them become the mask token, as in the pseudo-perplexity of Salazar et al. 2020, which masks one at a
        time: where BERT's training keeps or swaps a token, there is no prediction of a hidden one to score.
        """
        ordinary = ~torch.isin(tokens, torch.tensor(self.special))
        wanted = (ordinary.sum(dim=1, keepdim=True) * MASKED_SHARE).round().clamp(min=1)
        draws = torch.rand(tokens.shape, generator=generator).masked_fill(~ordinary, 2.0)
        return ordinary & (draws.argsort(dim=1).argsort(dim=1) < wanted)


def _all_seen(input_ids: Tensor, labels: Tensor, decoder_input_ids: Tensor | None = None) -> Windows:
    return Windows(input_ids, torch.ones_like(input_ids), labels, decoder_input_ids)


def surrounding(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Special tokens before and after a text, from the encodings of a probe with and without them."""
    probe = "A a 1"
    bare, whole = encode(tokenizer, probe), encode(tokenizer, probe, special=True)
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return tuple(whole[:start]), tuple(whole[start + len(bare) :])
    raise InputError(f"the tokenizer does not keep the text {probe!r} whole between its special tokens")


def _special_of(tokenizer: Tokenizer) -> tuple[int, ...]:
    # A special token that the vocabulary lacks has no id, and no text has it.
    return tuple(sorted(token for token in tokenizer.all_special_ids if token is not None))


def _mask_of(tokenizer: Tokenizer | None) -> int:
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise InputError("a masked model is measured with its tokenizer's mask token, and there is none")
    return int(mask)


def _start_of(model: nn.Module) -> int:
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    if start is None:
        raise InputError("its configuration lacks decoder_start_token_id, which the decoder reads first")
    return int(start)
