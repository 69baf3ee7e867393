"""Sketch of every row of an embedding, to judge rows that no probe reads and to recognize a rotation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

DIRECTIONS = 8
"""Random directions that a row is projected on. The relative standard error of a squared distance is sqrt(2 / 8)."""
MOST = 4.0
"""The most that a row's squared relative error counts: that of a row turned into its opposite."""
RARE = 256
"""Token ids below it are single bytes and special tokens in most vocabularies, and no more frequent than the next."""
ROTATED = 0.02
"""Largest relative difference that a rotation may leave: half precision rounds by 0.004."""
CHUNK = 8192


@dataclass(frozen=True, eq=False)
class EmbeddingRows:
    """The rows of one embedding of the baseline.

    A projection on random directions keeps distances (Johnson and Lindenstrauss 1984), at a 72nd of the size where the
    hidden size is 576.
    """

    path: str
    norms: Tensor
    projections: Tensor
    sample: Tensor
    """Some rows, twice as many as they have columns: enough to tell how all of them were rotated."""

    @classmethod
    def of_embeddings(cls, part: nn.Module) -> dict[str, EmbeddingRows]:
        """Rows of every embedding in a part of a model, by path."""
        found = {}
        for path, module in part.named_modules():
            if isinstance(module, nn.Embedding):
                weight = module.weight.detach()
                norms = torch.cat([torch.linalg.vector_norm(rows, dim=-1) for rows in _chunks(weight)])
                found[path] = cls(path, norms, _projections(weight, None), _sample(weight).clone())
        return found

    def expected_error(self, part: nn.Module, rotation: Tensor | None = None) -> float:
        """The squared relative error to expect of a row, if rows are used as often as tokens with their ids are.

        :param rotation: orthogonal matrix by which the edited model rotates its hidden states.
        :returns: infinity where rows are of another size.
        """
        edited = self._edited(part)
        if edited.shape[1:] != self.sample.shape[1:]:
            return math.inf
        difference = _projections(edited, rotation) - self.projections[: len(edited)]
        sizes = self.norms[: len(edited)].square()
        errors = difference.square().sum(-1) / sizes.clamp(min=1e-6 * float(sizes.mean()) + 1e-30)
        frequency = token_frequency(len(errors)).to(errors)
        return float((errors.clamp(max=MOST) * frequency).sum())

    def lost(self, part: nn.Module, ids: Tensor) -> Tensor:
        """Mask of the token ids whose rows the edited embedding has no longer."""
        left = len(self._edited(part))
        return (ids >= left) & (left < len(self.norms))

    def rotation(self, part: nn.Module) -> Tensor | None:
        """The orthogonal matrix that the edited rows were multiplied with, if they were, and not by the identity.

        It is the solution of the orthogonal Procrustes problem (Schoenemann 1966), if that explains the edited rows.
        """
        edited = _sample(self._edited(part)).float()
        before = self.sample.float().to(edited.device)
        if edited.shape != before.shape or not edited.isfinite().all() or len(before) <= before.shape[1]:
            return None
        size = torch.linalg.vector_norm(before)
        lengths = torch.linalg.vector_norm(edited, dim=-1) - torch.linalg.vector_norm(before, dim=-1)
        is_moved = torch.linalg.vector_norm(edited - before) > ROTATED * size
        if not is_moved or torch.linalg.vector_norm(lengths) > ROTATED * size:
            return None
        # On the CPU, in double precision: not every device has it, and rows may lie close to a subspace.
        left, _, right = torch.linalg.svd(before.cpu().double().T @ edited.cpu().double())
        rotation = (left @ right).to(before)
        return rotation if torch.linalg.vector_norm(before @ rotation - edited) <= ROTATED * size else None

    def _edited(self, part: nn.Module) -> Tensor:
        """The edited rows that the baseline has, too."""
        return part.get_parameter(f"{self.path}.weight".lstrip(".")).detach()[: len(self.norms)]


def token_frequency(rows: int) -> Tensor:
    """Expected frequency of tokens by id, float64 (rows,), with sum 1.

    Tokenizers number tokens by how early they were merged or how probable they are, so that the frequency falls as
    1 / (id + shift) by Zipf's law with Mandelbrot's shift.
    """
    frequency = 1 / (torch.arange(rows, dtype=torch.float64) + min(RARE, rows / 4))
    return frequency / frequency.sum()


def _sample(weight: Tensor) -> Tensor:
    """Rows from all over the vocabulary: its first ones may be bytes that were never trained."""
    wanted = 2 * weight.shape[1]
    return weight[:: max(1, len(weight) // wanted)][:wanted]


def _projections(weight: Tensor, rotation: Tensor | None) -> Tensor:
    directions = torch.randn(DIRECTIONS, weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    directions = directions.to(weight.device) / DIRECTIONS**0.5
    if rotation is not None:
        directions = directions @ rotation
    return torch.cat([functional.linear(rows, directions) for rows in _chunks(weight)])


def _chunks(weight: Tensor) -> Iterator[Tensor]:
    return (rows.float() for rows in torch.split(weight, CHUNK))
