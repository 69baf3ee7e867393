"""Images as a model's processor hands them over: made of data, or random colours in the same range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from invarlock.api import InputError, Noise, UsageError, complaints_of, one_line, read_json
from plugins_builtin.tasks.beside import folder_beside

COARSE = 4
"""Patches of colour along each side of an image: noise alone looks the same to a model wherever it looks."""
MIDDLE = (0.5, 0.5, 0.5)
"""Mean and deviation of pixels between 0 and 1 where no processor lies beside the model."""
CONFIG, WHOLE = "preprocessor_config.json", "processor_config.json"
"""The second one holds the processors of images and of text as sections."""
SIDE = 224
"""Pixels along each side where neither the model nor its processor states a size: that of ImageNet's classifiers."""


def noise_images(model: Any, count: int, size: tuple[int, int], *, seed: int) -> Tensor:
    """Images as the processor hands them over, float32 (count, channels, height, width)."""
    noise = Noise(seed, torch.device("cpu"))
    coarse = functional.interpolate(noise.uniform(count, 3, COARSE, COARSE), size=size)
    pixels = (coarse + noise.uniform(count, 3, *size)) / 2
    mean, deviation = (_channels(_processor(model), key) for key in ("image_mean", "image_std"))
    return ((pixels - mean) / deviation)[:, : getattr(model.config, "num_channels", len(MIDDLE))]


def given_images(model: Any, files: Sequence[Path], *, side: int | None = None) -> Mapping[str, Tensor]:
    """Images of files, as the processor beside the model makes them: ``pixel_values``, and what else it gives.

    :param side: make all of them squares of so many pixels first, for a model that reads images of any size.
    :raises UsageError: an image does not open, or a library is missing.
    :raises InputError: there is no processor.
    """
    folder = folder_beside(model)
    images = [_opened(file, side) for file in files]
    with complaints_of(f"{folder}: its image processor cannot be used"):
        from transformers import AutoImageProcessor

        if folder is None or not _processor(model):
            raise InputError(f"{folder}: images are read as {CONFIG} says, and there is none; add the original's")
        processor = AutoImageProcessor.from_pretrained(folder)
        return dict(processor(images=images, return_tensors="pt"))


def _opened(file: Path, side: int | None) -> Any:
    try:
        image = import_module("PIL.Image")
    except ImportError:
        raise UsageError("dataset.provider: images need pillow: pip install 'invarlock[images]'") from None
    try:
        with image.open(file) as opened:
            pixels = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, image.DecompressionBombError) as error:
        raise UsageError(f"dataset.path: {file} does not open as an image: {one_line(error)}") from None
    return pixels if side is None else pixels.resize((side, side))


def size_of(model: Any) -> tuple[int, int]:
    """Height and width of the images that a model of images alone reads."""
    processor = _processor(model)
    stated = getattr(model.config, "image_size", None) or processor.get("crop_size") or processor.get("size")
    if isinstance(stated, Mapping):
        side = stated.get("shortest_edge", SIDE)
        stated = stated.get("height", side), stated.get("width", side)
    return pair(stated or SIDE)


def pair(stated: int | Sequence[int]) -> tuple[int, int]:
    """Height and width, of which a configuration may state but one for both."""
    height, width = (stated, stated) if isinstance(stated, int) else stated
    return int(height), int(width)


def _processor(model: nn.Module) -> Mapping[str, Any]:
    folder = folder_beside(model)
    if folder is None:
        return {}
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG)
    whole = read_json(folder / WHOLE).get("image_processor") if (folder / WHOLE).is_file() else None
    return whole if isinstance(whole, dict) else {}


def _channels(processor: Mapping[str, Any], key: str) -> Tensor:
    values = processor.get(key)
    given = values if isinstance(values, list) and len(values) == len(MIDDLE) else MIDDLE
    return torch.tensor(given, dtype=torch.float32).view(-1, 1, 1)
