"""Speech recognition: the text of a sound, as Whisper writes it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from invarlock.api import LanguageTask, Metric
from plugins_builtin.tasks.classes import is_in

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass

SPOKEN = 32
"""Tokens of a target: what is said in ten seconds or so."""
BANDS, SPANS = 8, 16
"""Patches of loudness in a random spectrogram, by pitch and by time."""
QUIET, LOUD = -0.5, 1.0
"""The range of most values in the log-mel spectrograms of Whisper's processor, which ends 8 decades below its top at
(top - 8 + 4) / 4, with the top of speech near 0."""


class Speech(LanguageTask):
    """The target of a sound: Whisper."""

    name, predicted = "speech", "seq2seq"
    metric = Metric("target_perplexity", "ratio")
    made_up, made_up_media = "random sounds, and text that the baseline writes of them", "random sounds"
    towers = frozenset({"audio"})

    def owns(self, model_class: ModelClass) -> bool:
        return is_in(model_class, "SPEECH_SEQ_2_SEQ", ending="ForSpeechSeq2Seq")

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any, **how: Any) -> Any:
        import torch
        from torch.nn import functional

        from invarlock.api import WindowLayout, Windows, read_text

        length = min(dataset.seq_len, SPOKEN, getattr(model.config, "max_target_positions", SPOKEN))
        start: Any = WindowLayout.of(model, None, task="seq2seq", length=2 * length).start
        sounds = _sounds(model, dataset.preview_n + dataset.final_n, dataset.seed)
        if documents is None:
            text = _written(model, sounds, start, length, dataset.seed)
        else:
            spoken = replace(dataset, seq_len=length)
            text = read_text(spoken, model, WindowLayout(length), tokenizer, documents)
        late = functional.pad(text[:, :-1], (1, 0), value=start)
        windows = Windows(late, torch.ones_like(late), text, late, media={"input_features": sounds})
        return windows[: dataset.preview_n], windows[dataset.preview_n :]


def _sounds(model: Any, count: int, seed: int) -> Tensor:
    """Spectrograms as the processor hands them over: patches of loudness, and noise."""
    import torch
    from torch.nn import functional

    from invarlock.api import Noise

    noise, bins, frames = (
        Noise(seed, torch.device("cpu")),
        model.config.num_mel_bins,
        2 * model.config.max_source_positions,
    )
    patches = functional.interpolate(noise.uniform(count, 1, BANDS, SPANS), size=(bins, frames)).squeeze(1)
    loudness = (patches + noise.uniform(count, bins, frames)) / 2
    return (QUIET + (LOUD - QUIET) * loudness).to(next(model.parameters()).dtype)


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
            drawn = (logits - noise.exponential(*logits.shape).log()).argmax(dim=-1, keepdim=True)
            rows = torch.cat([rows, drawn], dim=1)
    return rows[:, 1:].cpu()
