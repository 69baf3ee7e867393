"""Many small tensors of a device, on the CPU by one copy: each copy by itself would wait for the device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor


def on_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on the CPU, in their order; those that are there already are not copied."""
    found = list(tensors)
    alike: defaultdict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, tensor in enumerate(tensors):
        if tensor.device.type != "cpu":
            alike[tensor.device, tensor.dtype].append(place)
    for places in alike.values():
        several = [tensors[place] for place in places]
        flat = torch.cat([tensor.reshape(-1) for tensor in several]).cpu()
        parts = torch.split(flat, [tensor.numel() for tensor in several])
        for place, tensor, part in zip(places, several, parts, strict=True):
            found[place] = part.view(tensor.shape)
    return found
