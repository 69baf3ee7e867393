"""Double precision, which not every device has."""

from __future__ import annotations

from torch import Tensor


def for_float64(tensor: Tensor) -> Tensor:
    """The tensor where float64 is to be had: on the CPU, where its device is ``mps``."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor
