"""Images as the forward of a model takes them: whole, in tiles, or cut into patches.

The arguments of the part that makes features of an image tell which.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from plugins_builtin.tasks.images import given_images, noise_images, pair

SIDE = 8
"""Patches along each side of a random image whose size the model leaves open, before they are merged; one that is given
has twice as many."""


def random_images(model: Any, count: int, seed: int) -> dict[str, Tensor]:
    """Arguments of a model's forward that are random images, each (count, ...)."""
    pixels = noise_images(model, count, _size(model), seed=seed).to(next(model.parameters()).dtype)
    arranged = next((form for name, form in _FORMS.items() if name in _told(model)), _whole)
    return arranged(model.config, pixels)


def images_of_files(model: Any, files: Sequence[Path]) -> dict[str, Tensor]:
    """Arguments of a model's forward that are images of files, each (files, ...).

    Those of a model that reads images of any size are made squares first, so that all have as many tokens.
    """
    given, arguments = given_images(model, files, side=_side(model)), inspect.signature(model.forward).parameters
    media = {name: tensor for name, tensor in given.items() if name in arguments}
    pixels = media["pixel_values"].to(next(model.parameters()).dtype)
    if _reads_patches(model):
        return media | {"pixel_values": pixels.view(len(files), -1, pixels.shape[-1])}
    # Processors of models that read several images for one text take the files for those of one text.
    apart = {name: tensor.reshape(len(files), -1, *tensor.shape[2:]) for name, tensor in media.items()}
    return apart | {"pixel_values": pixels.reshape(apart["pixel_values"].shape)}


def first_of(media: Mapping[str, Tensor], device: Any) -> dict[str, Tensor]:
    """The first image as the tower of a model takes it."""
    first = {name: tensor[:1].to(device) for name, tensor in media.items()}
    # Patches of all images stand in one row.
    return first | ({"pixel_values": first["pixel_values"].flatten(0, 1)} if "image_grid_thw" in first else {})


def _told(model: Any) -> Mapping[str, Any]:
    """Arguments of what makes features of an image: a method of most models, the whole of others."""
    return inspect.signature(getattr(model, "get_image_features", model.forward)).parameters


def _reads_patches(model: Any) -> bool:
    return "image_grid_thw" in _told(model)


def _size(model: Any) -> tuple[int, int]:
    """Height and width of a random image."""
    vision = model.config.vision_config
    if hasattr(vision, "image_size") and not _reads_patches(model):
        return pair(vision.image_size)
    patches = math.isqrt(getattr(vision, "num_patches", SIDE**2))
    return patches * vision.patch_size, patches * vision.patch_size


def _side(model: Any) -> int | None:
    """Pixels along each side of the square that an image of a file is made first; None if the processor decides."""
    if _reads_patches(model):
        return int(2 * SIDE * model.config.vision_config.patch_size)
    return _size(model)[0] if _FORMS.keys() - {"spatial_shapes"} & _told(model).keys() else None


# -- forms of images, by what a model is told of them ------------------------------------------------------------------


def _whole(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pixels}


def _in_a_row(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches of an image of any size, and how many there are in time, height and width: Qwen-VL."""
    vision, (height, width) = config.vision_config, _patches_of(config, pixels)
    # A still image is a film of as many frames as a patch takes.
    rows = _rows(config, pixels).repeat(1, 1, vision.temporal_patch_size)
    grid = torch.tensor([[1, height, width]]).expand(len(pixels), -1)
    return {"pixel_values": rows, "image_grid_thw": grid}


def _in_rows(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """Patches of an image, of which none is padding: SigLIP 2."""
    rows, shape = _rows(config, pixels), torch.tensor([_patches_of(config, pixels)])
    seen = torch.ones(rows.shape[:2], dtype=torch.int64)
    return {"pixel_values": rows, "pixel_attention_mask": seen, "spatial_shapes": shape.expand(len(pixels), -1)}


def _in_tiles(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """An image in as many tiles as there may be, each the same, and the number of their arrangement: Llama 3.2."""
    tiles, count = config.vision_config.max_num_tiles, len(pixels)
    arrangements = [height * width for height, width in config.vision_config.supported_aspect_ratios]
    return {
        "pixel_values": pixels[:, None, None].expand(-1, 1, tiles, -1, -1, -1),
        # Zero is no image.
        "aspect_ratio_ids": torch.full((count, 1), 1 + arrangements.index(tiles)),
        "aspect_ratio_mask": torch.ones(count, 1, tiles, dtype=torch.int64),
    }


def _sized(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """An image and its size, of LLaVA-NeXT with the tiles that it is enlarged to; of Mistral 3 alone."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = pixels.shape[-2:]
    sizes = {"image_sizes": torch.tensor([[height, width]]).expand(len(pixels), -1)}
    if not hasattr(config, "image_grid_pinpoints"):
        return {"pixel_values": pixels, **sizes}
    enlarged = select_best_resolution((height, width), config.image_grid_pinpoints)
    tiles = 1 + math.ceil(enlarged[0] / height) * math.ceil(enlarged[1] / width)
    return {"pixel_values": pixels[:, None].expand(-1, tiles, -1, -1, -1), **sizes}


def _one_of_several(config: Any, pixels: Tensor) -> dict[str, Tensor]:
    """One image for a text that may have several: Idefics, SmolVLM."""
    return {"pixel_values": pixels[:, None]}


_FORMS: Mapping[str, Callable[[Any, Tensor], dict[str, Tensor]]] = {
    "image_grid_thw": _in_a_row,
    "spatial_shapes": _in_rows,
    "aspect_ratio_ids": _in_tiles,
    "image_sizes": _sized,
    "pixel_attention_mask": _one_of_several,
}
"""By the argument that tells a model of it."""


def _patches_of(config: Any, pixels: Tensor) -> tuple[int, int]:
    side = config.vision_config.patch_size
    return pixels.shape[-2] // side, pixels.shape[-1] // side


def _rows(config: Any, pixels: Tensor) -> Tensor:
    """Patches (images, patches, numbers)."""
    side = config.vision_config.patch_size
    return functional.unfold(pixels, side, stride=side).transpose(1, 2)
