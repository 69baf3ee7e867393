"""Sanity of tensors: numbers that are not finite, zeros, constant rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from plugins_builtin.guards.on_host import on_host

BATCH_BYTES = 1 << 28
"""Least size of a batch, after which a device is waited for; small enough for processes to share the work evenly."""


@dataclass(frozen=True)
class TensorFacts:
    """Facts of one tensor."""

    shape: tuple[int, ...]
    dtype: str
    finite: bool
    constant_rows: int
    constant_columns: int
    zero: bool


@dataclass(frozen=True, eq=False)
class Batch:
    """Tensors that lie side by side in a model, on one device."""

    tensors: Sequence[Tensor]

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def batches(tensors: Iterable[Tensor]) -> Iterator[Batch]:
    """The tensors in their order, together until they have ``BATCH_BYTES``."""
    for _, of_one_device in groupby(tensors, lambda tensor: tensor.device):
        few: list[Tensor] = []
        for tensor in of_one_device:
            few.append(tensor)
            if sum(each.nbytes for each in few) >= BATCH_BYTES:
                yield Batch(few)
                few = []
        if few:
            yield Batch(few)


def facts_of(tensors: Iterable[Tensor], shared: Mapping[int, tuple[int, int] | None]) -> list[TensorFacts]:
    """Facts of each tensor; a device is waited for once.

    :param shared: by the id of a tensor, an axis and how many entries along it to look at; the others have to be
        finite, and no more.
    """
    looks = [_Look.at(tensor, shared.get(id(tensor))) for tensor in tensors]
    numbers = map(float, on_host([number for look in looks for number in look.numbers]))
    return [look.facts([next(numbers) for _ in look.numbers]) for look in looks]


@dataclass(frozen=True, eq=False)
class _Look:
    """One tensor that its device may still be looking at."""

    shape: tuple[int, ...]
    dtype: str
    numbers: tuple[Tensor, ...]
    """The lowest and the highest number of the whole tensor, and of the part that is to be looked at; of its matrices
    the number of constant rows and of constant columns, too. None of a tensor of whole numbers."""

    @classmethod
    def at(cls, tensor: Tensor, shared: tuple[int, int] | None) -> _Look:
        shape, dtype = tuple(tensor.shape), str(tensor.dtype)
        # A view, because every operation on a streamed weight itself would read it again.
        tensor = tensor.detach().view(shape)
        if not tensor.is_floating_point() or not tensor.numel():
            return cls(shape, dtype, ())
        # The extremes tell finite and zero without a temporary of the weight's size.
        of_all = of_part = torch.aminmax(tensor)
        if shared:
            tensor = tensor.narrow(shared[0], 0, shared[1])
            of_part = torch.aminmax(tensor)
        sides = (tensor, tensor.mT) if tensor.ndim > 1 else ()
        return cls(shape, dtype, (*of_all, *of_part, *map(_constant_rows, sides)))

    def facts(self, numbers: Sequence[float]) -> TensorFacts:
        if not numbers:
            return TensorFacts(self.shape, self.dtype, True, 0, 0, False)
        lowest, highest, *of_part = numbers[:4]
        finite, zero = math.isfinite(lowest) and math.isfinite(highest), of_part == [0, 0]
        rows, columns = map(int, numbers[4:] or (0, 0))
        return TensorFacts(self.shape, self.dtype, finite, rows, columns, zero)


def _constant_rows(matrices: Tensor) -> Tensor:
    """Number of rows of matrices (..., rows, columns) that hold one value throughout; 0 for rows of one number."""
    if matrices.shape[-1] < 2:
        return matrices.new_zeros((), dtype=torch.int64)
    if matrices.device.type == "cpu":
        # Nearly every row is ruled out by two of its numbers. To choose the others, another device would have to wait.
        matrices = matrices[matrices[..., 0] == matrices[..., -1]]
    return (matrices == matrices[..., :1]).all(-1).sum()
