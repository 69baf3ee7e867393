"""Kernels of our own: where there is a compiler for them."""

from __future__ import annotations

import os
from importlib.util import find_spec

from torch import Tensor


def takes_triton(tensor: Tensor) -> bool:
    """True if Triton can work on a tensor: it comes with torch's builds for CUDA; its interpreter takes a CPU's."""
    return (tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and find_spec("triton") is not None
