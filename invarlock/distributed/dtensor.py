"""Weights that are spread over the processes of a run: each process holds a part of every large one.

All processes have to read such a weight at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Sharding(StrEnum):
    """Kinds of parallelism that spread a model."""

    TENSOR = "tensor"
    """Tensor parallelism: each process computes a part of every layer, on the same windows."""
    FULLY_SHARDED = "fully_sharded"
    """FSDP2: each computes every layer, whose weights are gathered for it, on windows of its own."""


def sharding_of(model: nn.Module) -> Sharding | None:
    """Parallelism that spreads a model over processes, or None where each has all of it."""
    if not any(is_spread(parameter) for parameter in model.parameters()):
        return None
    return Sharding.FULLY_SHARDED if hasattr(model, "set_reshard_after_forward") else Sharding.TENSOR


def is_spread(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes; itself where it is not spread."""
    return tensor.full_tensor() if is_spread(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory."""
    return tensor.to_local() if is_spread(tensor) else tensor


def assembler(tensor: Tensor) -> Callable[[Tensor], Tensor]:
    """Function that assembles a tensor from parts that are spread like this one's; it does not hold the tensor."""
    if not is_spread(tensor):
        return lambda part: part
    from torch.distributed.tensor import DTensor

    mesh, placements, shape, stride = tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride()
    device = tensor.device

    def assemble(part: Tensor) -> Tensor:
        parts = DTensor.from_local(part.to(device), mesh, placements, run_check=False, shape=shape, stride=stride)
        return whole(parts)

    return assemble


@contextmanager
def gathered(parameter: Tensor) -> Iterator[Tensor]:
    """A weight to be changed in place: of one that is spread a gathered copy, of which each keeps its part."""
    if not is_spread(parameter):
        yield parameter
        return
    from torch.distributed.tensor import DTensor, Replicate

    weight = whole(parameter.detach())
    yield weight
    mesh = parameter.device_mesh
    parts = DTensor.from_local(weight, mesh, [Replicate()] * mesh.ndim)
    local(parameter.detach()).copy_(local(parts.redistribute(placements=parameter.placements)))
