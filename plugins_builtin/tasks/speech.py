"""Speech recognition: the text of a sound, as Whisper writes it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from invarlock.api import LanguageTask, Metric
from plugins_builtin.tasks.classes import transformers_class

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass, Windows

SPOKEN = 32
"""Tokens of a target: what is said in ten seconds or so."""


class Speech(LanguageTask):
    """The target of a sound: Whisper."""

    name, predicted = "speech", "seq2seq"
    metric = Metric("target_perplexity", "ratio")
    made_up, made_up_media = "random sounds, and text that the baseline writes of them", "random sounds"
    reads = frozenset({"audio", "text"})
    towers = frozenset({"audio"})

    def owns(self, model_class: ModelClass) -> bool:
        # Others of transformers read waveforms, or spectrograms of other axes.
        known = transformers_class(model_class)
        ending = "WhisperForConditionalGeneration" if known else "ForSpeechSeq2Seq"
        return any(name.endswith(ending) for name in model_class.names)

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any, **how: Any) -> Any:
        from invarlock.api import WindowLayout, column, columns_of, drawn
        from plugins_builtin.tasks.sounds import given_sounds, random_sounds

        columns = columns_of(documents)
        length = min(dataset.seq_len, SPOKEN, getattr(model.config, "max_target_positions", SPOKEN))
        start: Any = WindowLayout.of(model, None, task="seq2seq", length=2 * length).start
        layout = WindowLayout.of(model, tokenizer, task="causal", length=length)
        if "audio" in columns:
            documents = drawn(documents, dataset)
            sounds = given_sounds(model, column(documents, "audio"))
            self.made_up_media = "" if "text" in columns else "text that the baseline writes of the sounds"
        else:
            sounds = random_sounds(model, dataset.preview_n + dataset.final_n, dataset.seed)
        sounds = sounds.to(next(model.parameters()).dtype)
        if "text" not in columns:
            windows = _targets(_written(model, sounds, start, length, dataset.seed), start)
        elif "audio" in columns:
            windows = _transcripts(model, column(documents, "text"), tokenizer, layout, start)
        else:
            texts = column(documents, "text")
            windows = _targets(_text(model, replace(dataset, seq_len=length), tokenizer, texts), start)
        windows = replace(windows, media={"input_features": sounds})
        return windows[: dataset.preview_n], windows[dataset.preview_n :]

    def measure(self, model: Any, preview: Windows, final: Windows, **how: Any) -> Any:
        """One pass, and then transcripts of a few sounds: none where each token that is written would read all weights
        from disk, or take several processes."""
        from invarlock.api import is_streamed
        from plugins_builtin.tasks.transcripts import TRANSCRIBED, transcribed

        measured = super().measure(model, preview, final, **how)
        if how.get("calls") or is_streamed(model):
            return measured
        return replace(measured, transcripts=transcribed(model, final[:TRANSCRIBED]))

    def compare(self, baseline: Any, edited: Any, judging: Any) -> Any:
        from plugins_builtin.tasks.transcripts import word_errors

        found = super().compare(baseline, edited, judging)
        if baseline.transcripts is None or edited.transcripts is None:
            return found
        return replace(found, figures=[word_errors(baseline.transcripts, edited.transcripts, judging.tokenizer)])


def _text(model: Any, dataset: Any, tokenizer: Any, documents: Any) -> Tensor:
    from invarlock.api import WindowLayout, read_text

    return read_text(dataset, model, WindowLayout(dataset.seq_len), tokenizer, documents)


def _targets(text: Tensor, start: int) -> Windows:
    """Windows of targets (n, length), which the decoder reads one step late."""
    import torch
    from torch.nn import functional

    from invarlock.api import Windows

    late = functional.pad(text[:, :-1], (1, 0), value=start)
    return Windows(late, torch.ones_like(late), text, late)


def _transcripts(model: Any, texts: Any, tokenizer: Any, layout: Any, start: int) -> Windows:
    """Windows of the text of each sound, between the special tokens of the tokenizer."""
    from invarlock.api import UNSCORED, encoded, padding_of

    text = encoded(texts, tokenizer, layout, padding_of(model)).trimmed()
    ids, mask = text.input_ids, text.attention_mask
    if layout.prefix[:1] == (start,):
        ids, mask = ids[:, 1:], mask[:, 1:]
    windows = _targets(ids, start)
    return replace(windows, labels=ids.masked_fill(mask == 0, UNSCORED))


def _written(model: Any, sounds: Tensor, start: int, length: int, seed: int) -> Tensor:
    """Text that the model writes of each sound, every token drawn from its own distribution."""
    import torch

    from invarlock.api import Noise, device_of, evaluating

    device = device_of(model)
    rows = torch.full((len(sounds), 1), start, device=device)
    noise = Noise(seed, device)
    with evaluating(model):
        encoded = torch.cat([model.get_encoder()(each.to(device)).last_hidden_state for each in torch.split(sounds, 4)])
        while rows.shape[1] <= length:
            logits = model(encoder_outputs=(encoded,), decoder_input_ids=rows).logits[:, -1].float()
            drawn = noise.drawn(logits).unsqueeze(-1)
            rows = torch.cat([rows, drawn], dim=1)
    return rows[:, 1:].cpu()
