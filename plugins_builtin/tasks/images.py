"""Images without data: random colours, coarse and fine, in the range that the model's processor gives pixels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.api import Noise, read_json

COARSE = 4
"""Patches of colour along each side of an image: noise alone looks the same to a model wherever it looks."""
MIDDLE = (0.5, 0.5, 0.5)
"""Mean and deviation of pixels between 0 and 1 where no processor lies beside the model."""


def noise_images(model: nn.Module, count: int, size: tuple[int, int], *, seed: int) -> Tensor:
    """Images as the processor hands them over, float32 (count, 3, height, width)."""
    noise = Noise(seed, torch.device("cpu"))
    coarse = functional.interpolate(noise.uniform(count, 3, COARSE, COARSE), size=size)
    pixels = (coarse + noise.uniform(count, 3, *size)) / 2
    mean, deviation = (_channels(_processor(model), key) for key in ("image_mean", "image_std"))
    return (pixels - mean) / deviation


def _processor(model: nn.Module) -> Mapping[str, Any]:
    path = Path(getattr(getattr(model, "config", None), "_name_or_path", ""), "preprocessor_config.json")
    return read_json(path) if path.is_file() else {}


def _channels(processor: Mapping[str, Any], key: str) -> Tensor:
    values = processor.get(key)
    given = values if isinstance(values, list) and len(values) == len(MIDDLE) else MIDDLE
    return torch.tensor(given, dtype=torch.float32).view(-1, 1, 1)
