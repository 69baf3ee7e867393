"""Inputs that ``reconstruction`` probes a model with: given tokens, or random ones where there are no windows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.api import context_of, device_of, input_embeddings, reads_images_alone, task_of, vocabulary_of
from plugins_builtin.guards.reconstruction.calls import CANNOT_RUN
from plugins_builtin.guards.reconstruction.embedding_rows import token_frequency
from plugins_builtin.tasks.image_inputs import first_of, random_images
from plugins_builtin.tasks.images import noise_images, size_of
from plugins_builtin.tasks.sounds import random_sounds


def of_tokens(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """Arguments of a model's forward that reads tokens, (1, tokens)."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return given | ({"decoder_input_ids": ids} if task_of(model) == "seq2seq" else {})


def random_inputs(model: Any, tokens: int, seed: int) -> dict[str, Tensor]:
    """Arguments of a model's forward: one sample of random tokens, pixels or sounds, whichever it cannot do without."""
    dtype = next(model.parameters()).dtype
    if reads_images_alone(model):
        return {"pixel_values": noise_images(model, 1, size_of(model), seed=seed).to(dtype)}
    ids = _random_tokens(model, tokens, seed)
    if getattr(model, "main_input_name", None) == "input_features":
        return {"input_features": random_sounds(model, 1, seed).to(dtype), "decoder_input_ids": ids}
    given = of_tokens(model, ids)
    return given | (random_images(model, 1, seed) if _has_two_towers(model) or _looks_aside(model) else {})


def images_of(model: Any, seed: int) -> Mapping[str, Tensor] | None:
    """A random image for the tower of a model that reads text without it, too; None where there is none, or it takes
    its images otherwise."""
    if _has_two_towers(model) or not hasattr(model, "get_image_features"):
        return None
    try:
        media = first_of(random_images(model, 1, seed), device_of(model))
        # Alone, for a tower that fails must not keep the text from being probed.
        with torch.no_grad():
            model.get_image_features(**media)
    except CANNOT_RUN:
        return None
    return media


def _has_two_towers(model: Any) -> bool:
    """True for a model that makes a vector of an image and one of a text, and has to be given both."""
    return hasattr(getattr(model, "config", None), "vision_config") and input_embeddings(model) is None


def _looks_aside(model: Any) -> bool:
    """True for a model whose text needs no tokens of the image that goes with it: Llama 3.2, GIT."""
    has_tower = hasattr(getattr(model, "config", None), "vision_config") and not hasattr(model, "get_image_features")
    return has_tower and "pixel_values" in inspect.signature(model.forward).parameters


def _random_tokens(model: Any, tokens: int, seed: int) -> Tensor:
    """Random token ids, int64 (1, tokens), as frequent as in text; uniform ones would be rare tokens nearly all."""
    rows = vocabulary_of(model) if _has_two_towers(model) else model.get_input_embeddings().weight.shape[0]
    spoken = getattr(getattr(model, "config", None), "max_target_positions", None)
    length = min(tokens, context_of(model) or tokens, spoken or tokens)
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(token_frequency(rows), length, replacement=True, generator=generator)[None]
