"""State that a server reads of a model besides its weights: hooks, attributes, configurations, modes, tokenizer.

Weights are covered by ``invarlock.models.snapshot``. Here a copy is kept, live objects are compared with it, and
attributes that differ are named and restored.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from torch.nn.modules import module as module_globals

TENSORS = ("_parameters", "_buffers")
"""Attributes of a module that snapshots and fingerprints cover."""
CONFIGURATIONS = ("config", "generation_config")
LIBRARY = ("torch.nn.functional", module_globals.__name__)
"""Modules whose functions every model computes with; the classes of its own modules have theirs."""
TOKENIZER_ATTRIBUTES = (
    "special_tokens_map",
    "added_tokens_decoder",
    "chat_template",
    "init_kwargs",
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
)
ENCODING = ("special_tokens_map", "chat_template")
"""Attributes of a tokenizer that windows are made with."""
LEFT_BEHIND = frozenset(
    {"_is_full_backward_hook", "_previous_max_cache_length", "_require_grads_hooks", "_is_torch_compile"}
)
"""Attributes that calls of torch and transformers leave on a module, which computes and saves the same."""


@dataclass
class ModelState:
    """State of a model at one moment, to be restored later."""

    namespaces: list[_Namespace]
    gradients: dict[str, tuple[Tensor, type, bool]]
    """Each parameter, its class, and whether it requires a gradient."""

    @classmethod
    def of(cls, model: nn.Module) -> ModelState:
        put_on_hooks_of_its_own(model)
        return cls(
            [_Namespace(name, owner) for name, owner in _owners(model)],
            {name: (tensor, type(tensor), tensor.requires_grad) for name, tensor in model.named_parameters()},
        )

    @classmethod
    def of_methods(cls, name: str, owner: Any) -> ModelState:
        """State of an object whose methods must stay, whatever else it keeps."""
        if owner is None:
            return cls([], {})
        return cls([_Namespace(*named, _is_code) for named in [(name, owner), *_kinds([owner])]], {})

    def settle(self) -> None:
        """Take numbers and tensors that differ by now as the model's own: some keep counts or caches while they run."""
        for namespace in self.namespaces:
            namespace.settle()

    def undo(self) -> list[str]:
        """Restore attributes that differ; returns their names."""
        changed = [name for namespace in self.namespaces for name in namespace.undo()]
        for name, (parameter, kind, required) in self.gradients.items():
            if type(parameter) is not kind:
                parameter.__class__ = kind
                changed.append(f"{name}.__class__")
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
                changed.append(f"{name}.requires_grad")
        return changed


def _owners(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Objects whose attributes decide what a model computes, each with a name for messages."""
    configurations: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        yield name or type(model).__name__, module
        for attribute in CONFIGURATIONS:
            if (configuration := vars(module).get(attribute)) is not None:
                _collect(f"{name}.{attribute}".lstrip("."), configuration, configurations)
    yield from configurations.values()
    yield from _kinds([*model.modules(), *(configuration for _, configuration in configurations.values())])
    for name in dict.fromkeys([*LIBRARY, *(type(module).__module__ for module in model.modules())]):
        if name in sys.modules:
            yield name, sys.modules[name]


def _kinds(objects: Iterable[Any]) -> Iterator[tuple[str, type]]:
    """Classes of some objects and their bases, each once, with its name."""
    kinds = dict.fromkeys(kind for one in objects for kind in type(one).__mro__ if kind is not object)
    return ((kind.__name__, kind) for kind in kinds)


def put_on_hooks_of_its_own(model: nn.Module) -> None:
    """Let transformers put on its hooks that capture hidden states, as it does once a model is asked for any.

    Before the model runs: a tower in it that was asked alone would have them twice.
    """
    with suppress(ImportError):
        from transformers import PreTrainedModel
        from transformers.utils.output_capturing import maybe_install_capturing_hooks

        if isinstance(model, PreTrainedModel):
            maybe_install_capturing_hooks(model)


def _collect(name: str, configuration: Any, found: dict[int, tuple[str, Any]]) -> None:
    """A configuration and those within it, as one for text and one for images."""
    if id(configuration) in found or not hasattr(configuration, "to_dict"):
        return
    found[id(configuration)] = name, configuration
    for attribute, value in vars(configuration).items():
        _collect(f"{name}.{attribute}", value, found)


class _Namespace:
    """The attributes of one object as they were.

    :param counted: tells of a name and a value whether that attribute is compared and restored.
    """

    def __init__(self, name: str, owner: Any, counted: Callable[[str, Any], bool] | None = None) -> None:
        self.name, self.owner, self.kind = name, owner, type(owner)
        self.counted = counted or _counted_by(owner)
        self.kept = {name: _copied(value) for name, value in self._live().items()}
        self.volatile: set[str] = set()
        """Attributes that the model's own code changes while it runs."""

    def _live(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.owner).items() if self.counted(name, value)}

    def _changed(self) -> list[str]:
        live, kept = self._live(), self.kept
        changed = [name for name, value in kept.items() if name not in live or not _same(live[name], value)]
        changed += [name for name in live if name not in kept]
        return [name for name in changed if name not in self.volatile]

    def settle(self) -> None:
        for name in self._changed():
            now = vars(self.owner).get(name)
            if isinstance(self.owner, nn.Module) and (isinstance(now, bool | int | float | None) or _are_tensors(now)):
                self.volatile.add(name)

    def undo(self) -> list[str]:
        changed = self._changed()
        for name in changed:
            if name in self.kept:
                _put_back(self.owner, name, self.kept[name])
            elif isinstance(self.owner, type):
                delattr(self.owner, name)
            else:
                del vars(self.owner)[name]
        if type(self.owner) is not self.kind:
            self.owner.__class__ = self.kind
            changed.append("__class__")
        return [f"{self.name}.{name}" for name in changed]


def _counted_by(owner: Any) -> Callable[[str, Any], bool]:
    if isinstance(owner, nn.Module):
        return lambda name, value: name not in TENSORS and name not in LEFT_BEHIND
    if owner is module_globals:
        return lambda name, value: name.startswith("_global_") or _is_code(name, value)
    if isinstance(owner, type | ModuleType):
        return _is_code
    return lambda name, value: True


def _is_code(name: str, value: Any) -> bool:
    """True if an attribute is called, or decides what reading an attribute gives."""
    return callable(value) or hasattr(type(value), "__get__")


def _are_tensors(value: Any) -> bool:
    """True for a tensor, and for a cache of some, as LeViT keeps one by device."""
    if isinstance(value, dict):
        return bool(value) and all(map(_are_tensors, value.values()))
    return isinstance(value, Tensor)


def _copied(value: Any) -> Any:
    """A copy of plain values, containers and tensors; anything else is kept as the object that it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_copied, value))
    if isinstance(value, dict):
        # Ordered dictionaries of hooks, too: an empty copy of the same kind, filled.
        copied = copy.copy(value)
        copied.update({key: _copied(entry) for key, entry in value.items()})
        return copied
    return value


def _same(live: Any, kept: Any) -> bool:
    if live is kept:
        return True
    if type(live) is not type(kept):
        return False
    if isinstance(kept, OrderedDict) and not kept:
        # Most of what is compared: modules without hooks.
        return not live
    if isinstance(kept, Tensor):
        return live.shape == kept.shape and live.dtype == kept.dtype and bool(torch.equal(live, kept))
    if isinstance(kept, Mapping):
        return list(live) == list(kept) and all(_same(live[key], kept[key]) for key in kept)
    if isinstance(kept, list | tuple):
        return len(live) == len(kept) and all(map(_same, live, kept))
    try:
        return bool(live == kept)
    except (TypeError, ValueError, RuntimeError):
        return False


def _put_back(owner: Any, name: str, kept: Any) -> None:
    """A container keeps its identity: others may hold it, as the handles of hooks do."""
    live = vars(owner).get(name)
    if isinstance(kept, dict) and type(live) is type(kept):
        live.clear()
        live.update(_copied(kept))
    elif isinstance(owner, type):
        setattr(owner, name, kept)
    else:
        vars(owner)[name] = _copied(kept)


def tokenizer_digest(tokenizer: Any, attributes: Sequence[str] = TOKENIZER_ATTRIBUTES) -> str:
    """A digest of what a tokenizer makes of text, and of what is saved of it.

    :param attributes: those that count; by default all of them, the path that it was loaded from among them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # The tokenizer of an adapter's own may have no more methods than it needs.
    vocabulary = getattr(tokenizer, "get_vocab", dict)
    described = [
        repr(sorted(vocabulary().items())) if backend is None else backend.to_str(),
        *(repr(getattr(tokenizer, name, None)) for name in attributes),
    ]
    return xxhash.xxh3_128_hexdigest("\n".join(described).encode("utf-8", "surrogatepass"))
