"""Sounds as a model's feature extractor hands them over: spectrograms of files, or random patches of loudness."""

from __future__ import annotations

import logging
import math
import wave
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from invarlock.api import Noise, UsageError, complaints_of, one_line
from plugins_builtin.tasks.beside import folder_beside

log = logging.getLogger("invarlock")

BANDS, SPANS = 8, 16
"""Patches of loudness in a random spectrogram, by pitch and by time."""
QUIET, LOUD = -0.5, 1.0
"""The range of most values in the log-mel spectrograms of Whisper's processor, which ends 8 decades below its top at
(top - 8 + 4) / 4, with the top of speech near 0."""


class _Sound(NamedTuple):
    samples: NDArray[np.float32]
    """One channel, between -1 and 1."""
    rate: int


def random_sounds(model: Any, count: int, seed: int) -> Tensor:
    """Spectrograms (count, bands, frames) of patches of loudness, and noise."""
    noise, bins = Noise(seed, torch.device("cpu")), model.config.num_mel_bins
    frames = 2 * model.config.max_source_positions
    patches = functional.interpolate(noise.uniform(count, 1, BANDS, SPANS), size=(bins, frames)).squeeze(1)
    loudness = (patches + noise.uniform(count, bins, frames)) / 2
    return QUIET + (LOUD - QUIET) * loudness


def given_sounds(model: Any, files: Sequence[Path]) -> Tensor:
    """Spectrograms of files, as the feature extractor beside the model makes them.

    Sounds of another sampling rate than the model's are resampled, which is logged.

    :raises UsageError: a file cannot be read, or a library is missing.
    """
    folder = folder_beside(model)
    sounds = [_read(file) for file in files]
    with complaints_of(f"{folder}: its feature extractor cannot be used"):
        from transformers import AutoFeatureExtractor

        extractor = AutoFeatureExtractor.from_pretrained(folder)
        rate = int(extractor.sampling_rate)
        if others := [file for file, sound in zip(files, sounds, strict=True) if sound.rate != rate]:
            log.warning("%d of %d sounds were resampled to %d Hz (as %s)", len(others), len(files), rate, others[0])
        samples = [_resampled(sound, rate) for sound in sounds]
        features: Tensor = extractor(samples, sampling_rate=rate, return_tensors="pt")["input_features"]
    return features


def _resampled(sound: _Sound, rate: int) -> NDArray[np.float32]:
    # Only here: every run imports this module, and scipy.signal takes longer than all else that it imports.
    from scipy.signal import resample_poly

    shared = math.gcd(sound.rate, rate)
    return np.asarray(resample_poly(sound.samples, rate // shared, sound.rate // shared), dtype=np.float32)


def _read(file: Path) -> _Sound:
    try:
        sound = _by_library(file) if find_spec("soundfile") else _pcm(file)
    except (OSError, EOFError, RuntimeError, wave.Error) as error:
        todo = "" if find_spec("soundfile") else "; formats other than PCM in .wav take pip install 'invarlock[audio]'"
        raise UsageError(f"dataset.path: {file} does not open as a sound: {one_line(error)}{todo}") from None
    if not len(sound.samples):
        raise UsageError(f"dataset.path: {file} holds no sound")
    return sound


def _by_library(file: Path) -> _Sound:
    samples, rate = import_module("soundfile").read(file, dtype="float32", always_2d=True)
    return _Sound(samples.mean(axis=1), int(rate))


def _pcm(file: Path) -> _Sound:
    with wave.open(str(file), "rb") as opened:
        width, channels, rate = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
        data = np.frombuffer(opened.readframes(opened.getnframes()), dtype=np.uint8)
    data = data[: len(data) // (width * channels) * width * channels].reshape(-1, channels, width)
    if width == 1:
        # The only width without a sign.
        data = data ^ np.uint8(0x80)
    # Shifted to the top of 32 bits, so that all widths have one range.
    words = np.zeros((*data.shape[:2], 4), dtype=np.uint8)
    words[..., 4 - width :] = data
    levels = words.view("<i4").squeeze(-1) / 2.0**31
    return _Sound(levels.mean(axis=1).astype(np.float32), rate)
