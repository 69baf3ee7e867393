"""A weight that is stored as codes and scales, and the checks that all layouts share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from invarlock.checkpoints.reader import Checkpoint
from invarlock.core.errors import InputError

Tensors = Mapping[str, Tensor]
"""The stored tensors of a weight, by the part that each plays in it."""
CODES = (torch.float8_e4m3fn, torch.int8, torch.uint8)
"""Types in which no layout stores a weight without scales."""
WORDS = (torch.int32, torch.uint32)
NAN_EXPONENT, E8M0_BIAS = 255, 127
"""Of E8M0, which has neither zero nor infinity."""
ZERO = "zero"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class PackedWeight:
    """A weight of a checkpoint, the tensors that it is stored in, and how they become the weight."""

    name: str
    stored: Mapping[str, str]
    """Name of each tensor, by its part."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: str
    """As reports name it: ``FP8 (E4M3), per channel``."""
    bits: int
    """Of each code, without scales."""
    unpack: Callable[[Tensors], Tensor]
    scales: Sequence[str] = ("scale",)
    """Parts that have to be finite and not zero."""
    zero_scales: bool = False
    """True where quantizers store a scale of zero for weights that are all zero."""
    offsets: Sequence[str] = ()
    """Parts that have to be finite, and may be zero: smallest numbers, levels of codes."""


class Layout(Protocol):
    """Function that finds the weights of a checkpoint that are stored in one layout.

    :param settings: section ``quantization_config`` of its configuration.
    :raises InputError: a tensor is missing or has a wrong shape, or the layout is one that cannot be unpacked.
    """

    def __call__(self, checkpoint: Checkpoint, settings: Mapping[str, object]) -> Iterator[PackedWeight]: ...


def stems(checkpoint: Checkpoint, suffix: str) -> list[str]:
    """Names of the modules that have a tensor of this last name."""
    return [name.removesuffix(suffix) for name in checkpoint if name.endswith(suffix)]


def expect(checkpoint: Checkpoint, name: str, *shapes: tuple[int, ...], of: str) -> str:
    """The name of a tensor that is there, and has one of some shapes.

    :param of: the weight that it belongs to.
    :raises InputError: it is missing, or has another shape.
    """
    entry = checkpoint.entries.get(name)
    if entry is None:
        raise broken(checkpoint, f"{of} is packed, and {name} is missing")
    if entry.shape not in shapes:
        raise broken(checkpoint, f"{name} has shape {entry.shape}, and {of} needs {' or '.join(map(str, shapes))}")
    return name


def unsound(scales: Tensor) -> str | None:
    """The word for scales that quantizers do not write, or None."""
    if scales.dtype == torch.uint8:
        return "NaN" if (scales == NAN_EXPONENT).any() else None
    numbers = scales.float()
    if not numbers.isfinite().all():
        return "not finite"
    return ZERO if (numbers == 0).any() else None


def broken(checkpoint: Checkpoint, what: str) -> InputError:
    return InputError(f"{checkpoint.folder}: {what}")


def words_unpacked(words: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits from words of 32 bits along the last axis, the lowest bits first.

    Where ``bits`` does not divide 32, codes cross words, and 32 of them fill ``bits`` words.
    """
    if words.dtype not in WORDS:
        raise ValueError(f"its codes or zero points are stored as {words.dtype}, not as words of 32 bits")
    codes: Tensor
    words, most = words.view(torch.int32), 2**bits - 1
    if 32 % bits == 0:
        codes = (words.unsqueeze(-1) >> torch.arange(0, 32, bits, device=words.device)) & most
        return codes.flatten(-2)
    runs = words.reshape(*words.shape[:-1], -1, bits).long() & 0xFFFFFFFF
    starts = torch.arange(0, 32 * bits, bits, device=words.device)
    first, shifts = starts // 32, starts % 32
    following = runs[..., (first + 1).clamp(max=bits - 1)] << (32 - shifts)
    codes = ((runs[..., first] >> shifts) | following) & most
    return codes.int().flatten(-2)
