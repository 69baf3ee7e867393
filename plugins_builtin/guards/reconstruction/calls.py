"""The parts of a model that ``reconstruction`` runs alone, and the calls that it runs them with.

A part is a block (an element of an outermost ``nn.ModuleList``) or, outside of the blocks, a largest module without a
block in it: the embedding, the final norm, the head. A call is what a part was given while the baseline read a few
tokens, so that the part can be run again by itself, with its own weights or with edited ones.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.api import attached, device_of, evaluating, find_blocks, has_weights, reads_images_alone, recording
from plugins_builtin.guards.activations import tensors_in

CANNOT_RUN = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)
"""Exceptions of a part that is missing, has wrong shapes, or cannot be run alone."""


def find_parts(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks, and the largest modules with weights that neither hold a block nor are inside of one."""
    blocks = find_blocks(model)
    holders = {""} | {
        ".".join(block.split(".")[:depth]) for block in blocks for depth in range(1, block.count(".") + 1)
    }
    parts: dict[str, nn.Module] = {}
    part = ""
    for path, module in model.named_modules() if blocks else ():
        inside = part and path.startswith(part)
        if path in blocks or (path not in holders and not inside and has_weights(module)):
            parts[path], part = module, f"{path}."
    return parts


@dataclass(frozen=True)
class Cut:
    """Cuts the tensors of a call down to the first ``tokens`` tokens of its first window."""

    windows: int | None
    """None where tokens come first, as experts take them: (tokens, size)."""
    length: int
    tokens: int

    @classmethod
    def of(cls, leading: Tensor, tokens: int) -> Cut:
        """Cut as the leading tensor of a call needs it: hidden states (windows, length, size) or token ids."""
        if leading.ndim == 4:
            # An image, or what a convolution makes of one: it stays whole.
            return cls(leading.shape[0], leading.shape[1], leading.shape[1])
        is_flat = leading.ndim == 1 or (leading.ndim == 2 and leading.is_floating_point())
        windows, length = (None, leading.shape[0]) if is_flat else leading.shape[:2]
        return cls(windows, length, min(tokens, length))

    def __call__(self, tensor: Tensor) -> Tensor:
        heads = self._heads_of_bias(tensor.shape)
        if self.windows is not None and tensor.ndim > 1 and tensor.shape[0] == self.windows * max(heads, 1):
            tensor = tensor[: max(heads, 1)]
        if self.tokens < self.length:
            for axis in [2] if heads else self._token_axes(tensor.shape):
                tensor = tensor.narrow(axis, 0, self.tokens)
        return tensor.detach().clone()

    def _heads_of_bias(self, shape: Sequence[int]) -> int:
        """Heads of a bias by the distance of tokens, (windows * heads, 1, tokens), as BLOOM has it; 0 of all else."""
        if self.windows is None or len(shape) != 3 or tuple(shape[1:]) != (1, self.length) or shape[0] == self.windows:
            return 0
        return shape[0] // self.windows

    def _token_axes(self, shape: Sequence[int]) -> list[int]:
        """Axis 0 of positions, 1 of hidden states and rotary angles, the last two of attention's masks and biases.

        The last axis of (1, tokens, size) and of (1, heads, tokens, size) is none, even if it has that length.
        """
        if self.windows is None or len(shape) == 1:
            axes = [0]
        elif len(shape) == 4:
            of_mask = shape[1] == shape[2] == 1
            axes = [3] if of_mask else [1] if shape[2] != self.length else [2, 3] if shape[3] == shape[2] else [2]
        else:
            # What a module has made of (1, tokens, size) may be (tokens, size): a router's choice.
            axes = [0] if len(shape) == 2 and shape[0] == self.length else [1]
        return [axis for axis in axes if axis < len(shape) and shape[axis] == self.length]


@dataclass(frozen=True, eq=False)
class Call:
    """Arguments of a module: copies of tensors and plain values; caches, modules and other live objects are dropped."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype | None
    """Type of the module's weights when it was called; for other weights, tensors of this type are cast to theirs."""

    @classmethod
    def of(
        cls, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], keep: Callable[[Tensor], Tensor]
    ) -> Call:
        given = {key: False if key == "use_cache" else value for key, value in kwargs.items()}
        return cls(tuple(_map(args, keep)), _map(given, keep), _dtype(module))

    @property
    def leading(self) -> Tensor | None:
        return leading_of(self.args, self.kwargs)

    @property
    def streams(self) -> list[Tensor]:
        """The leading hidden states and every other argument of their kind, such as the encoder's; none twice."""
        first = self.leading
        if first is None or not first.is_floating_point():
            return []
        alike = [
            tensor
            for tensor in tensors_in((self.args, self.kwargs))
            if tensor.is_floating_point() and (tensor.ndim, tensor.shape[-1]) == (first.ndim, first.shape[-1])
        ]
        return list({id(tensor): tensor for tensor in [first, *alike]}.values())

    def run(self, module: nn.Module, replaced: Mapping[int, Tensor] | None = None) -> Any:
        """Run a module on the call.

        :param replaced: by the id of a tensor of the call, the one to give in its place.
        """
        dtype, device = _dtype(module), next((entry.device for entry in module.parameters()), None)

        def give(tensor: Tensor) -> Tensor:
            tensor = (replaced or {}).get(id(tensor), tensor)
            wanted = dtype if dtype is not None and tensor.dtype == self.dtype else tensor.dtype
            return tensor.to(device or tensor.device, wanted)

        return module(*_map(self.args, give), **_map(dict(self.kwargs), give))

    def run_with_graph(
        self, module: nn.Module, replaced: Mapping[int, Tensor] | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run a module; its first output, and each stream with the leaf of the graph that stands for it."""
        given = replaced or {}
        streams = [(tensor, given.get(id(tensor), tensor).detach().requires_grad_()) for tensor in self.streams]
        leading = self.leading
        with torch.enable_grad() if leading is None else recording(leading.shape[:-1].numel(), leading.device):
            # Copies, for a module that adds to its input in place.
            output = self.run(module, {**given, **{id(tensor): leaf.clone() for tensor, leaf in streams}})
        first = next(tensors_in(output), None)
        if first is None:
            raise ValueError(f"the output is a {type(output).__name__} without a tensor")
        return first, streams


def leading_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden states or token ids that a module is called with: the first positional tensor, or one by its name."""
    by_name = [kwargs.get(name) for name in ("hidden_states", "input_ids", "inputs_embeds", "input", "x")]
    candidates = [*args[:1], *by_name, *args[1:], *kwargs.values()]
    return next((value for value in candidates if isinstance(value, Tensor) and value.ndim > 0), None)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(entry, change) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_map(entry, change) for entry in value)
    return value if isinstance(value, bool | int | float | str | slice | torch.dtype | torch.device) else None


def _dtype(module: nn.Module) -> torch.dtype | None:
    return next((entry.dtype for entry in module.parameters() if entry.is_floating_point()), None)


class Kept:
    """Cut tensors: one copy of the masks and angles that all blocks share."""

    def __init__(self) -> None:
        self._parts: dict[tuple[int, int, Cut], tuple[weakref.ref[Tensor], Tensor]] = {}

    def part(self, tensor: Tensor, cut: Cut) -> Tensor:
        # Its version changes with every operation in place.
        key = id(tensor), tensor._version, cut
        known = self._parts.get(key)
        # An id may have passed on to another tensor, so the first one has to be there still.
        if known is None or known[0]() is not tensor:
            known = self._parts[key] = weakref.ref(tensor), cut(tensor)
        return known[1]


@dataclass
class CallRecorder:
    """Recorder of the first call of each part, in the order of the calls."""

    tokens: int
    """Most of them to keep of a call."""
    calls: dict[str, Call] = field(default_factory=dict)
    kept: Kept = field(default_factory=Kept)

    @classmethod
    def of(cls, model: nn.Module, tokens: int) -> CallRecorder:
        # Blocks may know the height and width of what they are given, as Swin's do: an image stays whole.
        return cls(sys.maxsize if reads_images_alone(model) else tokens)

    def taps(self, model: nn.Module) -> dict[str, CallTap]:
        return {name: CallTap(partial(self._note, name)) for name in find_parts(model)}

    def _note(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], _: Any) -> None:
        leading = leading_of(args, kwargs)
        if name in self.calls or leading is None:
            return
        cut = Cut.of(leading, self.tokens)
        self.calls[name] = Call.of(module, args, kwargs, lambda tensor: self.kept.part(tensor, cut))

    def take(self) -> dict[str, Call]:
        """Hand the calls over: whoever still holds a tap holds no tensors."""
        calls, self.calls, self.kept = self.calls, {}, Kept()
        return calls


@dataclass(frozen=True)
class CallTap:
    """Tap that hands each call on; it has no result of its own."""

    note: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any], Any], None]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self.note(module, args, kwargs, output)

    def result(self) -> None:
        return None


def record(
    model: Any, given: Mapping[str, Tensor], tokens: int, images: Mapping[str, Tensor] | None
) -> dict[str, Call]:
    """The calls of one forward pass.

    :param given: arguments of the forward.
    :param tokens: most of them to keep of a call.
    :param images: what the tower of images is called with by itself, before the model reads text.
    """
    recorder, device = CallRecorder.of(model, tokens), device_of(model)
    uncached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with evaluating(model), attached(model, recorder.taps(model)):
        if images:
            model.get_image_features(**images)
        model(**{name: tensor.to(device) for name, tensor in given.items()}, **uncached)
    return recorder.take()
