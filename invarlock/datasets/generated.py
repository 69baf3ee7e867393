"""Text that the baseline model writes itself, for windows without any data.

Every token is drawn from the model's own distribution: temperature 1, nothing cut off, no penalty, and an end-of-text
token ends nothing. The model's ``generate`` is not called, because it adds whatever sampling settings came with the
checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.progress import Tally
from invarlock.datasets.layout import WindowLayout
from invarlock.datasets.noise import Noise
from invarlock.models.batches import batch_size, cached_batch_size, halved
from invarlock.models.decoding import Growing, Replayed, caches
from invarlock.models.facts import device_of, evaluating, logits_of, vocabulary_of

ROUNDS = 4

Step = Callable[[Tensor, Tensor], Tensor]
"""Logits (rows, vocabulary) of the next token, from all tokens of the rows and those that are new since the last."""


def write_text(model: nn.Module, layout: WindowLayout, count: int, *, seed: int) -> Tensor:
    """Let the model write ``count`` rows of text, int64 (count, ``layout.text``) on the CPU.

    A causal model continues its first token, a masked model fills in masks, a seq2seq model answers a source of random
    tokens. The model and torch's random state are left as they were. The same seed gives the same text, whatever the
    device and however many rows are written at once.

    :raises PluginError: the model's output has no logits.
    """
    writer = _Writer(model, layout, Noise(seed, device_of(model)), Tally(count * layout.text))
    size, done, rows = writer.rows_at_once(), 0, []
    with evaluating(model):
        while done < count:
            size = min(size, count - done)
            try:
                rows.append(writer.write_from(done, size).cpu())
                done += size
            except torch.OutOfMemoryError as error:
                size = halved(model, size, layout.length, error)
    return torch.cat(rows)


@dataclass(frozen=True)
class _Writer:
    model: nn.Module
    layout: WindowLayout
    noise: Noise
    written: Tally

    def rows_at_once(self) -> int:
        # Without a cache, or with masks, the logits of whole rows exist.
        cached = self.layout.mask is None and caches(self.model)
        return (cached_batch_size if cached else batch_size)(self.model, self.layout.length)

    def write_from(self, first: int, count: int) -> Tensor:
        """Rows of text from the number of the first one on."""
        return replace(self, noise=replace(self.noise, first=first)).write(count)

    def write(self, count: int) -> Tensor:
        if self.layout.mask is not None:
            return self.fill(count, self.layout.mask)
        if self.layout.start is not None:
            return self.answer(count, self.layout.start)
        return self.go_on(count)

    def go_on(self, count: int) -> Tensor:
        """Text of a causal model, after the tokenizer's prefix or from a token that begins a text."""
        prefix = self.tensor(self.layout.prefix).expand(count, -1)
        first = prefix if self.layout.prefix else self.first_tokens(count)
        length = self.layout.length - len(self.layout.suffix)
        return self.extend(first, length, self.causal_step(length))[:, len(self.layout.prefix) :]

    def answer(self, count: int, start: int) -> Tensor:
        """A source of random tokens, and the target that a seq2seq model makes of it."""
        half = self.layout.text // 2
        source = self.random_tokens(count, half)
        read = self.layout.surround(source)
        seen = torch.ones_like(read)
        first = self.tensor((start, *self.layout.prefix)).expand(count, -1)
        length = first.shape[1] + half
        # Not by the encoder alone: where its weights are spread over processes, only the whole model gathers them.
        encoded = self.model(input_ids=read, attention_mask=seen, decoder_input_ids=first).encoder_last_hidden_state
        step = self.step(
            length,
            lambda rows, fresh: {"encoder_outputs": (encoded,), "attention_mask": seen, "decoder_input_ids": fresh},
        )
        rows = self.extend(first, length, step)
        return torch.cat([source, rows[:, -half:]], dim=1)

    def fill(self, count: int, mask: int) -> Tensor:
        """Mask-predict (Ghazvininejad et al. 2019, section 3.2), but tokens are drawn, not the likeliest taken.

        All are drawn at once; then, round after round, fewer and fewer of the least likely ones are drawn anew.
        """
        length, before = self.layout.text, len(self.layout.prefix)
        text = self.tensor((mask,)).repeat(count, length)
        likelihood = torch.zeros(text.shape, device=text.device)
        for rounds_left in reversed(range(ROUNDS)):
            rows = self.layout.surround(text)
            output = self.model(input_ids=rows, attention_mask=torch.ones_like(rows))
            logits = logits_of(self.model, output)[:, before : before + length].float()
            drawn = self.noise.drawn(logits.masked_fill(~self.ordinary, -torch.inf))
            hidden = text == mask
            text = torch.where(hidden, drawn, text)
            drawn_likelihood = logits.log_softmax(dim=-1).gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            likelihood = torch.where(hidden, drawn_likelihood, likelihood)
            doubtful = likelihood.topk(length * rounds_left // ROUNDS, largest=False).indices
            text = text.scatter(1, doubtful, mask)
            self.written.add(text.numel() // ROUNDS)
        return text

    def extend(self, rows: Tensor, length: int, step: Step) -> Tensor:
        """Draw token after token until the rows are ``length`` long."""
        fresh = rows
        while rows.shape[1] < length:
            fresh = self.noise.drawn(step(rows, fresh)).unsqueeze(1)
            rows = torch.cat([rows, fresh], dim=1)
            self.written.add(len(fresh))
        return rows

    def causal_step(self, length: int) -> Step:
        if replayed := Replayed.of(self.model, length):
            return lambda rows, fresh: replayed(fresh)
        return self.step(length, lambda rows, fresh: {"input_ids": fresh, "attention_mask": torch.ones_like(rows)})

    def step(self, length: int, inputs: Callable[[Tensor, Tensor], dict[str, Any]]) -> Step:
        """A step by the model's own cache or, where it has none, by reading all of the rows again.

        :param length: of the rows in the end.
        :param inputs: the model's arguments, from all of the rows and the part of them that it has not read yet.
        """
        if caches(self.model):
            return Growing(self.model, length, inputs)
        return lambda rows, fresh: logits_of(self.model, self.model(**inputs(rows, rows)))[:, -1]

    def first_tokens(self, count: int) -> Tensor:
        begin = getattr(getattr(self.model, "config", None), "bos_token_id", None)
        if isinstance(begin, int) and begin < len(self.ordinary):
            return self.tensor((begin,)).expand(count, -1)
        return self.random_tokens(count, 1)

    def random_tokens(self, *shape: int) -> Tensor:
        tokens = self.ordinary.nonzero().squeeze(1)
        return tokens[self.noise.below(len(tokens), *shape)]

    @cached_property
    def ordinary(self) -> Tensor:
        """Mask of the tokens that are not special, bool (vocabulary,)."""
        tokens = torch.arange(vocabulary_of(self.model), device=self.noise.device)
        return ~torch.isin(tokens, self.tensor(self.layout.special))

    def tensor(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor(tokens, dtype=torch.int64, device=self.noise.device)
