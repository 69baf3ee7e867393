"""Autograd's own threads: it has one for each device."""

from __future__ import annotations

import torch
from torch import nn


def start_contexts(model: nn.Module) -> None:
    """Let autograd's thread of each CUDA device of a model start its context.

    It has none until its first kernel. Where that is one of cuBLAS, torch warns on the terminal.
    """
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        with torch.enable_grad():
            number = torch.ones((), device=device, requires_grad=True)
            torch.autograd.grad(number.square(), number)
