"""Files of images, sounds and records for tests, and the configuration of the processor that reads the sounds."""

from __future__ import annotations

import json
import math
import wave
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

SOUNDS = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 1}
CAPTIONS = ["In the beginning God created the heaven", "And the earth was without form", "Let there be light"]


def draw(folder: Path, count: int = 3) -> Path:
    """Images of random colours."""
    folder.mkdir()
    colours = np.random.default_rng(0)
    for number in range(count):
        pixels = colours.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def play(path: Path, rate: int = 16_000, width: int = 2) -> Path:
    """A second of two tones in PCM."""
    times = np.arange(rate) / rate
    levels = 0.4 * np.sin(2 * math.pi * 440 * times) + 0.2 * np.sin(2 * math.pi * 1000 * times)
    words = (levels * 2**31).astype("<i4").view(np.uint8).reshape(-1, 4)[:, 4 - width :]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes((words ^ 0x80 if width == 1 else words).tobytes())
    return path


def lines(path: Path, *records: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
