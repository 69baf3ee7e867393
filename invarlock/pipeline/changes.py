"""Changes of every tensor that a checkpoint stores: each is named, and those that are no honest edit are findings."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.progress import counted
from invarlock.core.results import Action, EditedWeight, Finding
from invarlock.models.fingerprint import stored_tensors
from invarlock.models.norms import is_norm, norm_offset
from invarlock.models.structure import Role, block_of, role_of
from invarlock.pipeline.keeping import some
from invarlock.pipeline.token_rows import EDIT, TokenRows
from invarlock.quantization.changes import CHANGED, OFF_BY_ONE, TRANSPOSED, UNCHANGED, ZERO, change_of, column_scales
from invarlock.quantization.differences import relative_error
from invarlock.quantization.grids import some_rows
from invarlock.quantization.layout import WeightLayout
from invarlock.quantization.selection import WeightTarget, find_weights

MOVED = 0.25
"""Of the change that scaled columns ask of a norm: what may be missing where it was made. Rounding leaves a hundredth,
scales of columns that were quantized afterwards a tenth; a norm that was left alone misses all of it."""
LEAST_MOVED = 0.02
"""Relative change of a norm that is worth reading the matrices of its block again: scales that count as such (their
logarithms spread by 0.05) ask for 0.03 at least, and a fine-tune changes every norm by less."""
ROWS_FOR_SCALES = 256
"""Rows of a matrix that its columns' scales are read off."""


@dataclass(frozen=True)
class Changes:
    """The changes of all tensors, and the findings among them."""

    tensors: list[EditedWeight]
    findings: list[Finding]


def find_changes(
    model: nn.Module, before: Mapping[str, Tensor], tokenizer: Any = None, equal: Collection[str] = ()
) -> Changes:
    """Each tensor of a model against the baseline's, read for the comparison and let go.

    :param before: the baseline's tensors by every name that it has for each; nothing is written to them.
    :param tokenizer: the baseline's, which names rows of tokens, or None.
    :param equal: names of tensors that are known to be the baseline's, bit for bit.
    """
    return _Comparison(model, before, TokenRows.of(model, tokenizer), equal).changes()


class _Comparison:
    """A model and the tensors that it is compared with."""

    def __init__(
        self, model: nn.Module, before: Mapping[str, Tensor], tokens: TokenRows, equal: Collection[str]
    ) -> None:
        self._model, self._before, self._tokens, self._equal = model, before, tokens, equal
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._weights = {name: target for target in find_weights(model) for name in target.names}
        self._lost_tokens: list[Finding] = []

    def changes(self) -> Changes:
        tensors = [*self._stored(), *self._missing()]
        return Changes(tensors, [*_findings(tensors), *self._lost_tokens])

    def _stored(self) -> Iterator[EditedWeight]:
        """Tensors of the model; a tied one again under a name of which the baseline has something else."""
        first: dict[int, str] = {}
        for name, tensor in counted(list(stored_tensors(self._model))):
            if first.setdefault(id(tensor), name) == name or not self._tied_before(first[id(tensor)], name):
                yield self._change(name, tensor)

    def _tied_before(self, name: str, other: str) -> bool:
        one, another = self._before.get(name), self._before.get(other)
        return one is None or another is None or one is another or torch.equal(one, another)

    def _missing(self) -> Iterator[EditedWeight]:
        there = {name for name, _ in stored_tensors(self._model)}
        for name in self._before:
            if name not in there:
                old = self._before[name]
                yield EditedWeight(
                    name=name, role="other", change="missing", parameters=old.numel(), device=str(old.device)
                )

    def _change(self, name: str, tensor: Tensor) -> EditedWeight:
        # A view, because every operation on a streamed tensor itself would read it again.
        new, old = tensor.detach().view(tensor.shape), self._before.get(name)
        target, role = self._weights.get(name), self._role(name, tensor)
        made = partial(
            EditedWeight,
            name=target.name if target and target.parameter_name == name else name,
            role=role,
            parameters=new.numel(),
            device=str(new.device),
        )
        if old is None:
            return made(change="not in the baseline")
        # What holds NaN, of which a sum tells, is equal to nothing; and types of 8 bits have no sums.
        if name in self._equal and new.itemsize > 1 and not new.is_meta and new.sum().isfinite():
            return made(change=UNCHANGED, relative_error=0.0)
        old = old.to(new.device)
        change = change_of(old, new, target.layout if target else WeightLayout.OUT_IN)
        text = change.text
        if role == "norm" and text == CHANGED:
            text = self._smoothed(name, old, new) or text
        same_width = old.shape[1:] == new.shape[1:]
        if target and role in (Role.EMBEDDING, Role.HEAD) and same_width and text != UNCHANGED:
            text += self._tokens.named(change.rows)
            self._lost_tokens += self._tokens.lost(target, old, new)
        return made(change=text, bits=change.bits, relative_error=_relative_error(old, new, text))

    def _role(self, name: str, tensor: Tensor) -> str:
        if name in self._weights:
            return self._weights[name].role.value
        path, _, key = name.rpartition(".")
        module = self._modules[path]
        if is_norm(module):
            return "norm"
        return "bias" if "bias" in key else str(role_of(self._model, self._modules, path, tensor))

    def _smoothed(self, name: str, old: Tensor, new: Tensor) -> str | None:
        """Scales of columns that came out of a norm: rightly, or as if it multiplied by another number than it does."""
        path, _, key = name.rpartition(".")
        if key != "weight" or (relative_error(old, new) or math.inf) < LEAST_MOVED:
            return None
        offset = norm_offset(self._modules[path])
        if offset is None:
            return None
        factor, wrong = ("1 + w", "w") if offset else ("w", "1 + w")
        for reader, scales in self._scaled_readers(path, len(new)):
            if _moved(old, new, scales, offset):
                return f"smoothed: divided by the scales of the columns of {reader}"
            if _moved(old, new, scales, 1 - offset):
                return f"{OFF_BY_ONE}: smoothed as if it multiplied by {wrong}, and it multiplies by {factor}"
        return None

    def _scaled_readers(self, norm: str, size: int) -> Iterator[tuple[str, Tensor]]:
        """Matrices of a norm's block whose columns, as many as it has numbers, were scaled; and their scales."""
        block = block_of(self._modules, norm)
        for target in dict.fromkeys(self._weights.values()):
            path, shape = target.parameter_name.rpartition(".")[0], target.parameter.shape
            if block_of(self._modules, path) != block or target.matrix_shape[-1] != size:
                continue
            old, new = self._before.get(target.parameter_name), target.parameter.detach().view(shape)
            if old is None or old.shape != shape:
                continue
            before, after = (_some_rows(target, weight) for weight in (old.to(new.device), new))
            if (scales := column_scales(before, after)) is not None:
                # Blocks may be spread over devices, a norm over others than its readers.
                yield target.name, scales.cpu()


def _some_rows(target: WeightTarget, weight: Tensor) -> Tensor:
    return some_rows(target.layout.matrices(weight).flatten(0, -2), ROWS_FOR_SCALES)


def _moved(old: Tensor, new: Tensor, scales: Tensor, offset: int) -> bool:
    """True if a norm of weights (n) plus an offset was divided by scales (n)."""
    before, after = old.cpu().float() + offset, new.cpu().float() + offset
    missing = torch.linalg.vector_norm(after * scales - before)
    return bool(missing <= MOVED * torch.linalg.vector_norm((scales - 1) * before))


def _relative_error(old: Tensor, new: Tensor, text: str) -> float | None:
    if text == UNCHANGED:
        return 0.0
    if old.shape[1:] == new.shape[1:]:
        # Rows that came or went are named; the error is that of the others.
        shared = min(len(old), len(new)) if old.ndim else None
        old, new = (old[:shared], new[:shared]) if shared else (old, new)
    if old.shape != new.shape:
        return None
    return relative_error(old.detach(), new.detach())


def _findings(tensors: Sequence[EditedWeight]) -> Iterator[Finding]:
    """Mistakes that no edit makes on purpose, whatever a few windows show of them."""
    by_kind: defaultdict[str, list[EditedWeight]] = defaultdict(list)
    for tensor in tensors:
        by_kind[tensor.kind].append(tensor)
    if norms := [tensor for tensor in by_kind[OFF_BY_ONE] if tensor.role == "norm"]:
        yield Finding(EDIT, Action.ROLLBACK, f"norm weights {norms[0].change}: {_some(norms)}")
    if transposed := by_kind[TRANSPOSED]:
        yield Finding(EDIT, Action.ROLLBACK, f"transposed: {_some(transposed)}")
    if zeroed := by_kind[ZERO]:
        yield Finding(EDIT, Action.WARN, f"all zero, and not in the baseline: {_some(zeroed)}")


def _some(tensors: Sequence[EditedWeight]) -> str:
    return some([tensor.name for tensor in tensors])
