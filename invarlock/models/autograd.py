"""Gradients on CUDA devices: the threads that autograd has for them, and the attention of short passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FEW_TOKENS = 256
"""The attention scores of so many have 256 KiB per head in float32."""


@contextmanager
def recording(tokens: int, device: torch.device) -> Iterator[None]:
    """Meanwhile operations are recorded for gradients.

    On a CUDA device few tokens attend to each other by plain products. Fused kernels for gradients are not those of a
    pass, and take half a second to load; some of them add up gradients in another order each time.
    """
    plain = device.type == "cuda" and tokens <= FEW_TOKENS
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if plain else nullcontext():
        yield


def start_contexts(model: nn.Module) -> None:
    """Let autograd's thread of each CUDA device of a model start its context.

    It has none until its first kernel. Where that is one of cuBLAS, torch warns on the terminal.
    """
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        with torch.enable_grad():
            number = torch.ones((), device=device, requires_grad=True)
            torch.autograd.grad(number.square(), number)
