"""Images as a model's processor hands them over: made of data, or random colours in the same range."""

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
SIDE = 224
"""Pixels along each side where neither the model nor its processor states a size: that of ImageNet's classifiers."""


def noise_images(model: nn.Module, count: int, size: tuple[int, int], *, seed: int) -> Tensor:
    """Images as the processor hands them over, float32 (count, 3, height, width)."""
    noise = Noise(seed, torch.device("cpu"))
    coarse = functional.interpolate(noise.uniform(count, 3, COARSE, COARSE), size=size)
    pixels = (coarse + noise.uniform(count, 3, *size)) / 2
    mean, deviation = (_channels(_processor(model), key) for key in ("image_mean", "image_std"))
    return (pixels - mean) / deviation


def size_of(model: Any) -> tuple[int, int]:
    """Height and width of the images that a model of images alone reads."""
    processor = _processor(model)
    stated = getattr(model.config, "image_size", None) or processor.get("crop_size") or processor.get("size")
    if isinstance(stated, Mapping):
        side = stated.get("shortest_edge", SIDE)
        stated = stated.get("height", side), stated.get("width", side)
    if isinstance(stated, int):
        return stated, stated
    return (int(stated[0]), int(stated[1])) if stated else (SIDE, SIDE)


def _processor(model: nn.Module) -> Mapping[str, Any]:
    path = Path(getattr(getattr(model, "config", None), "_name_or_path", ""), "preprocessor_config.json")
    return read_json(path) if path.is_file() else {}


def _channels(processor: Mapping[str, Any], key: str) -> Tensor:
    values = processor.get(key)
    given = values if isinstance(values, list) and len(values) == len(MIDDLE) else MIDDLE
    return torch.tensor(given, dtype=torch.float32).view(-1, 1, 1)
