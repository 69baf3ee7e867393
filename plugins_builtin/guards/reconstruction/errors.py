"""Cost of an edit, part by part: each part is run alone on the baseline's hidden states.

Of the baseline only a :class:`Reference` stays: the calls of its parts, what they put out, and the gradients by which
an error of theirs is weighed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from invarlock.api import counted, evaluating, find_blocks, one_line, predicts_tokens
from plugins_builtin.guards.activations import are_finite
from plugins_builtin.guards.figures import ratio
from plugins_builtin.guards.reconstruction.calls import CANNOT_RUN, Call, find_parts
from plugins_builtin.guards.reconstruction.embedding_rows import EmbeddingRows
from plugins_builtin.guards.reconstruction.leaves import Leaf, observe_leaves

UNKNOWN_SENSITIVITY = 0.5
"""Sensitivity of a part that no gradient reaches: losing its whole update counts as half a nat per token."""
MOST_WEIGHT = 10.0
"""Largest weight of one token, in typical tokens. The first one, which all others attend to (attention sinks: Xiao et
al. 2023), would else count as anything from five to a hundred, and the score would vary as much from text to text."""
SAME = 0.02
"""Two tensors are one, up to a factor, if they differ by less: half precision differs by 0.004 per rounding."""


@dataclass
class BaselinePart:
    """One part of the baseline: its call, its output, and the gradient that prices an error of it."""

    name: str
    is_block: bool
    call: Call
    output: Tensor
    leaves: dict[str, Leaf]
    rows: dict[str, EmbeddingRows]
    gradient: Tensor | None = None
    """Gradient of the summed log likelihood of sampled outcomes by the output of this part; tempered."""
    fed_by: str | None = None
    """The part whose output, times ``factor``, is what this one was called with."""
    factor: float = 1.0


@dataclass(frozen=True)
class PartError:
    """Error of an edited part on the baseline's hidden states."""

    name: str
    relative: float
    """Relative to the update of a block, to the output of any other part."""
    nats: float
    """Estimated rise of the log loss, in nats per token."""
    failure: str | None = None
    """Reason why the edited part could not be run."""


@dataclass(frozen=True)
class PartJudgement:
    """The errors of all parts, in the order in which they are called."""

    errors: Sequence[PartError]
    rotated: bool
    """True if the edited model's hidden states are the baseline's in another basis, and were compared in that."""

    @property
    def score(self) -> float:
        return sum(error.nats for error in self.errors)


class Reference:
    """The baseline's parts as one short stretch of tokens passed through them."""

    def __init__(self, model: nn.Module, calls: Mapping[str, Call], *, seed: int) -> None:
        """Run every part on its own call, from the last to the first, and carry gradients back.

        :raises ValueError: not one block could be run.
        """
        self.parts: dict[str, BaselinePart] = {}
        self.unmeasured = dict.fromkeys(_uncalled(model, calls.keys()), "not called")
        self.sizes = {name: sum(each.nbytes for each in model.get_submodule(name).parameters()) for name in calls}
        blocks = find_blocks(model)
        last = max((place for place, name in enumerate(calls) if name in blocks), default=-1)
        self.tail = tuple(name for place, name in enumerate(calls) if place > last)
        self.predicts = predicts_tokens(model)
        """Else no likelihood prices an error: each part has the sensitivity of one that no gradient reaches."""
        self.head: str | None = None
        self.positions = 1
        backward = _Backward()
        with evaluating(model):
            for name in counted(list(calls)[::-1], self.sizes.__getitem__):
                call = calls[name]
                try:
                    self._add(name, model.get_submodule(name), call, name in blocks, backward, seed)
                except CANNOT_RUN as error:
                    self.unmeasured[name] = one_line(error)
        self.parts = dict(reversed(self.parts.items()))
        if not any(part.is_block for part in self.parts.values()):
            raise ValueError(f"no block (nn.ModuleList) could be run alone: {self.unmeasured or 'the model has none'}")

    def _add(self, name: str, module: nn.Module, call: Call, is_block: bool, backward: _Backward, seed: int) -> None:
        with observe_leaves(module) as leaves:
            output, streams = call.run_with_graph(module)
        if not are_finite(output):
            raise ValueError("the baseline gives NaN or infinity")
        kept = output.detach()
        rows = {} if is_block or name in self.tail else EmbeddingRows.of_embeddings(module)
        part = self.parts[name] = BaselinePart(name, is_block, call, kept, leaves, rows)
        if self.tail and name == self.tail[-1] and self.predicts:
            self.head, self.positions = name, kept.shape[:-1].numel()
            backward.carry(part, output, streams, _outcome_gradient(kept, seed))
        else:
            gradient = backward.reaching(part, self.parts)
            backward.carry(part, output, streams, gradient)
            if gradient is not None and are_finite(gradient):
                part.gradient = _tempered(gradient.float(), _update(part))

    @property
    def unedited(self) -> PartJudgement:
        """The judgement of a model that computes what the baseline does."""
        return PartJudgement([PartError(name, 0.0, 0.0) for name in self.parts], rotated=False)

    def judge(self, model: nn.Module) -> PartJudgement:
        """Run every part of an edited model on the baseline's calls."""
        moved: dict[str, Tensor] = {}
        parts = list(self.parts.values())
        with evaluating(model):
            rotation = self._rotation(model)
            errors = [
                self._error(part, model, moved, rotation) for part in counted(parts, lambda part: self.sizes[part.name])
            ]
        return PartJudgement(errors, rotation is not None)

    def _rotation(self, model: nn.Module) -> Tensor | None:
        """Orthogonal matrix by which the edited model rotates all hidden states; None if it does not.

        The embedding shows a rotation, and the first block whether it is made up for: negating an embedding is one too.
        """
        first = next(part for part in self.parts.values() if part.is_block)
        for part in self.parts.values():
            for rows in part.rows.values():
                try:
                    rotation = rows.rotation(model.get_submodule(part.name))
                except AttributeError:  # No such part; running it will say so.
                    continue
                if rotation is not None:
                    turned, straight = (self._error(first, model, {}, entry).relative for entry in (rotation, None))
                    return rotation if turned < straight else None
        return None

    def _error(
        self, part: BaselinePart, model: nn.Module, moved: dict[str, Tensor], rotation: Tensor | None
    ) -> PartError:
        """Run one part.

        :param moved: by how much the outputs of the parts after the last block have moved so far; the next one gets
            its input moved likewise, so that what one loses and the next one makes up for counts for nothing.
        """
        try:
            module = model.get_submodule(part.name)
            # With a graph, like the baseline: attention may take another road without one.
            lost = _lost_tokens(part, module)
            inputs = self._inputs(part, moved, rotation) | {key: ids for key, (ids, _) in lost.items()}
            output, _ = part.call.run_with_graph(module, inputs)
            output = output.detach().to(part.output.device).float()
            if rotation is not None and part.name != self.head and output.shape[-1] == len(rotation):
                output = output @ rotation.T.to(output.device)
            before = part.output.float()
            if part.name == self.head:
                # Logits of the tokens that both vocabularies have.
                before, output = before[..., : output.shape[-1]], output[..., : before.shape[-1]]
            difference = output - before
            for _, tokens in lost.values():
                difference = difference.masked_fill(tokens.to(difference.device), 0)
        except CANNOT_RUN as error:
            return PartError(part.name, math.inf, math.inf, f"cannot be run: {one_line(error)}")
        if not are_finite(difference):
            return PartError(part.name, math.inf, math.inf, "gives NaN or infinity")
        if part.name in self.tail:
            moved[part.name] = difference
        relative = ratio(float(difference.norm()), float(_update(part)[..., : difference.shape[-1]].norm()))
        return PartError(part.name, relative, self._nats(part, difference, relative, module, rotation))

    def _inputs(self, part: BaselinePart, moved: Mapping[str, Tensor], rotation: Tensor | None) -> dict[int, Tensor]:
        """Hidden states for a part, by id of the recorded ones; rotated and moved as those before it were."""
        given = {id(stream): stream for stream in part.call.streams}
        leading = part.call.leading
        if leading is not None and part.fed_by is not None and part.fed_by in moved:
            given[id(leading)] = leading + (part.factor * moved[part.fed_by]).to(leading.device, leading.dtype)
        if rotation is None:
            return given
        return {
            key: (stream.float() @ rotation.to(stream.device)).to(stream.dtype)
            for key, stream in given.items()
            if stream.shape[-1] == len(rotation)
        }

    def _nats(
        self, part: BaselinePart, difference: Tensor, relative: float, module: nn.Module, rotation: Tensor | None
    ) -> float:
        if part.name == self.head:
            before = part.output[..., : difference.shape[-1]]
            return _divergence(before, before + difference)
        if part.name in self.tail and self.head is not None:
            return 0.0  # The head's divergence has it.
        if part.gradient is None:
            return UNKNOWN_SENSITIVITY * relative**2
        along = (part.gradient * difference).sum(-1).cpu().double()
        measured = 0.5 * float(along.square().sum()) / self.positions
        expected = max((rows.expected_error(module, rotation) for rows in part.rows.values()), default=0.0)
        return max(measured, expected * self._sensitivity(part))

    def _sensitivity(self, part: BaselinePart) -> float:
        """Cost of a squared relative error of 1 in a random direction, in nats per token."""
        if part.gradient is None:
            return UNKNOWN_SENSITIVITY
        slopes, sizes = (_squares(tensor) for tensor in (part.gradient, part.output))
        return 0.5 * float((slopes * sizes).sum()) / part.output.shape[-1] / self.positions


def _lost_tokens(part: BaselinePart, module: nn.Module) -> dict[int, tuple[Tensor, Tensor]]:
    """Token ids to read in place of a call's, by the id of those, and a mask (..., 1) of the tokens that the edited
    embedding has no rows for: each of them becomes token 0, and has no error."""
    ids = part.call.leading
    if ids is None or ids.is_floating_point():
        return {}
    masks = [rows.lost(module, ids) for rows in part.rows.values()]
    return {id(ids): (ids.masked_fill(mask, 0), mask[..., None]) for mask in masks if mask.any()}


class _Backward:
    """Gradients on their way from the head to the embedding, part by part: no graph is larger than one part's."""

    def __init__(self) -> None:
        self._waiting: dict[int, tuple[str, Tensor, Tensor]] = {}

    def carry(
        self, part: BaselinePart, output: Tensor, streams: list[tuple[Tensor, Tensor]], gradient: Tensor | None
    ) -> None:
        """Carry the gradient at a part's output back to what it was called with."""
        if gradient is None or not streams:
            return
        carried = _carried(output, [leaf for _, leaf in streams], gradient.to(output.dtype))
        for (tensor, _), slope in zip(streams, carried, strict=True):
            if slope is not None:
                before = self._waiting.get(id(tensor))
                self._waiting[id(tensor)] = part.name, tensor, slope if before is None else before[2] + slope

    def reaching(self, part: BaselinePart, parts: Mapping[str, BaselinePart]) -> Tensor | None:
        """The gradient at a part's output, from the part that was called with it; the two are linked.

        Where none was called with just that output, as blocks are with the sum of two embeddings, the next one that
        takes in hidden states of the same shape is taken to pass the error on.
        """
        waiting = [entry for entry in reversed(self._waiting.values()) if entry[1].shape == part.output.shape]
        for name, tensor, gradient in waiting:
            factor = _factor(tensor, part.output)
            if factor is not None:
                if tensor is parts[name].call.leading:
                    parts[name].fed_by, parts[name].factor = part.name, factor
                return (factor * gradient).to(part.output.device)
        return waiting[0][2].to(part.output.device) if waiting else None


def _carried(output: Tensor, leaves: Sequence[Tensor], gradient: Tensor) -> Sequence[Tensor | None]:
    try:
        return torch.autograd.grad(output, leaves, gradient, allow_unused=True)
    except RuntimeError:
        # It works in place, or its kernels have no gradient: its residual connection is taken for the whole of it.
        return [gradient if leaf is leaves[0] and leaf.shape == gradient.shape else None for leaf in leaves]


def _uncalled(model: nn.Module, called: Collection[str]) -> list[str]:
    """The parts that were not called, save those whose weights all stand in others too."""
    parts = find_parts(model)
    measured = {id(parameter) for name in called for parameter in parts[name].parameters()}
    return [
        name for name, part in parts.items() if any(id(parameter) not in measured for parameter in part.parameters())
    ]


def _factor(tensor: Tensor, output: Tensor) -> float | None:
    """Factor between an output and a tensor, or None if the tensor is not a multiple of the output."""
    there, here = tensor.float(), output.to(tensor.device).float()
    size = float(there.square().sum())
    factor = float((there * here).sum()) / max(float(here.square().sum()), 1e-30)
    return factor if float((there - factor * here).square().sum()) <= SAME**2 * size else None


def _outcome_gradient(logits: Tensor, seed: int) -> Tensor:
    """The gradient, at the logits, of the negative log likelihood of outcomes that the model itself draws.

    The mean of its outer product is the Fisher information: half of it, along an error, is the divergence of the
    distributions before and after to second order.
    """
    gradient = logits.float().softmax(-1)
    chances = torch.rand(gradient.shape[:-1], generator=torch.Generator().manual_seed(seed)).to(gradient)
    for likely, chance in zip(_few(gradient), _few(chances[..., None]), strict=True):
        total = likely.cumsum(-1)
        drawn = torch.searchsorted(total, chance * total[:, -1:]).clamp(max=likely.shape[-1] - 1)
        likely.scatter_add_(1, drawn, torch.full_like(chance, -1))
    return gradient


def _few(tensor: Tensor) -> tuple[Tensor, ...]:
    """Views of a few positions each: what is made of them stays in the cache."""
    return torch.split(tensor.flatten(0, -2), 4)


def _divergence(logits: Tensor, others: Tensor) -> float:
    """The mean Kullback-Leibler divergence of two distributions, in nats."""
    total = torch.zeros((), device=logits.device)
    for some, other in zip(_few(logits), _few(others), strict=True):
        before, after = some.float().log_softmax(-1), other.float().log_softmax(-1)
        total += (before.exp() * (before - after)).sum()
    return max(0.0, float(total)) / logits.shape[:-1].numel()


def _tempered(gradient: Tensor, update: Tensor) -> Tensor:
    """The gradient, shortened at tokens where an error would cost more than at ``MOST_WEIGHT`` typical ones."""
    weight = _squares(gradient) * _squares(update)
    most = MOST_WEIGHT * weight.median()
    return gradient * (most / torch.maximum(weight, most)).sqrt()[..., None] if most > 0 else gradient


def _squares(tensor: Tensor) -> Tensor:
    return tensor.float().square().sum(-1)


def _update(part: BaselinePart) -> Tensor:
    """Update of a block: its output minus its hidden states; the whole output of any other part."""
    leading, output = part.call.leading, part.output.float()
    if part.is_block and leading is not None and leading.shape == output.shape:
        return output - leading.to(output.device).float()
    return output
