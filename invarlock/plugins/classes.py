"""The class form of a plugin: subclass ``Guard`` or ``ModelAdapter`` and register the class as an entry point.

The base classes carry the hook implementations, which call the plain methods below, so that an author of a class never
sees a hook. This module imports no torch.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from invarlock import hookimpl
from invarlock.core.errors import UsageError
from invarlock.core.inputs import complaints_of, panics_unprinted


class OptionNotTakenError(UsageError):
    """A key of ``model`` is set that an adapter has no use for; with ``adapter: auto`` the next one is asked."""


class Guard(ABC):
    """Looks at a model before and after an edit, and says what is to be done with the edit.

    The constructor takes the guard's options: ``guards.NAME.option: value`` in the configuration becomes
    ``option=value``. An option that it does not take is an error before anything is loaded.
    """

    name: ClassVar[str] = ""
    """For a reader; a result always carries the name under which the host registered the guard."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Distributions that the guard needs; one that is not installed makes its status "missing"."""

    shares_work: ClassVar[bool] = False
    """True: all processes of a run ask the guard, and not the first one alone; what it does in ``invarlock.api.each``
    is shared among them. For guards that look at weights, and at nothing else: in all processes but the first there are
    no ``observations``, and all have to say the same."""

    taps_optional: ClassVar[bool] = False
    """True: on the baseline ``prepare`` does without the taps that ``observe`` returned, where the baseline's pass is
    not run because a reference holds it."""

    def observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        """Ask for module inputs and outputs, before each of the two forward passes.

        :returns: a tap (``invarlock.api.Tap``) for each module name to look at; it sees the preview
            windows only. What its ``result()`` is after the pass stands in ``context["observations"]``; plain data
            and tensors can be kept in a reference, which then stands in for the baseline's pass.
        """
        return {}

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        """Look at the baseline, before the edit.

        :param calib: the preview windows, an iterable of batches: dicts of ``input_ids`` and ``attention_mask``,
            int64 tensors of shape (windows, tokens).
        :param policy: the guard's options, as in the configuration.
        :returns: a dict with ``ready``; ``ready: False`` aborts before the edit. It must not change the model.
        """
        return {"ready": True}

    @abstractmethod
    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> Mapping[str, Any]:
        """Judge the edited model.

        :param context: ``baseline`` and ``edited`` (what the passes measured), ``edit`` (the plan and what it did to
            each module), ``policy``, ``observations``, ``attempt``, ``device``, ``rank``.
        :returns: a dict: ``passed`` (bool), ``action`` (continue, warn, rollback or abort), ``message``, ``metrics``,
            ``warnings``. It must not change the model.
        """

    @hookimpl
    def invarlock_observe(self, model: Any, adapter: Any, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.observe(model, adapter, policy)

    @hookimpl
    def invarlock_prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.prepare(model, adapter, calib, policy)

    @hookimpl
    def invarlock_validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> Mapping[str, Any]:
        return self.validate(model, adapter, context)


class ModelAdapter(ABC):
    """Loads a model of some format. Only ``load_model`` has to be written.

    The model is a ``torch.nn.Module`` that can be called with ``input_ids`` and ``attention_mask`` and returns an
    object with ``logits``, as those of transformers do.
    """

    name: ClassVar[str] = ""
    requires: ClassVar[tuple[str, ...]] = ()
    keeps_class: ClassVar[bool] = False
    """True if it makes the class that ``config.json`` names, so that one that no task owns can be refused unloaded."""

    @abstractmethod
    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        """Load the model, or return None when this adapter does not own ``model_id``.

        :param kwargs: ``dtype``, ``trust_remote_code`` and ``revision`` of the configuration's ``model`` section.
        """

    def load_tokenizer(self, model_id: str, **kwargs: Any) -> Any:
        """Load the model's own tokenizer: by default what transformers finds beside the weights."""
        from transformers import AutoTokenizer

        remedy = (
            "put the model's tokenizer files beside its weights, or judge without text (dataset.provider: generated)"
        )
        with (
            panics_unprinted(),
            complaints_of(f"{model_id}: no tokenizer could be loaded from there; {remedy}"),
        ):
            tokenizer = AutoTokenizer.from_pretrained(model_id, **{"trust_remote_code": False, **kwargs})
            # Where there are no files, some classes of transformers are made without a vocabulary.
            if len(tokenizer) <= len(tokenizer.all_special_ids):
                raise ValueError("its vocabulary is empty")
            # What is broken can show only when text is read.
            tokenizer("a")
        return tokenizer

    def describe(self, model: Any) -> dict[str, Any]:
        """Tell what the model is, for guards and the report."""
        config = getattr(model, "config", None)
        # A fresh dict of the names that architectures use for the same thing; what a model lacks is None.
        return {
            "model_type": getattr(config, "model_type", None),
            "model_class": type(model).__name__,
            "n_layer": _first(config, "num_hidden_layers", "n_layer", "num_layers"),
            "n_head": _first(config, "num_attention_heads", "n_head", "num_heads"),
            "hidden_size": _first(config, "hidden_size", "n_embd", "d_model"),
            "vocab_size": getattr(config, "vocab_size", None),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
        }

    def snapshot(self, model: Any) -> Any:
        """Keep what is needed to bring ``model`` back bit for bit: by default its tensors, in memory or on disk."""
        from invarlock.checkpoints.reader import files_of
        from invarlock.models.snapshot import Snapshot

        return Snapshot(model, files_of(model))

    def restore(self, model: Any, snapshot: Any) -> None:
        """Bring ``model`` back to what it was when ``snapshot`` was taken."""
        snapshot.restore(model)

    @hookimpl
    def invarlock_load_model(self, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        return self.load_model(**_accepted(self.load_model, {"model_id": model_id, "device": device, **options}))

    @hookimpl
    def invarlock_load_tokenizer(self, model_id: str, options: Mapping[str, Any]) -> Any:
        return self.load_tokenizer(model_id, **options)

    @hookimpl
    def invarlock_describe(self, model: Any) -> dict[str, Any]:
        return self.describe(model)

    @hookimpl
    def invarlock_snapshot(self, model: Any) -> Any:
        return self.snapshot(model)

    @hookimpl
    def invarlock_restore(self, model: Any, snapshot: Any) -> bool:
        self.restore(model, snapshot)
        return True


def _first(config: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _accepted(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function takes; one that was set in the configuration and is not taken is an error."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    defaults = {"device": "auto", "dtype": "auto", "trust_remote_code": False, "revision": None, "stream": False}
    # What is only an offer: a model that each process has all of is shared by its windows.
    defaults["parallel"] = arguments.get("parallel")
    for name, value in arguments.items():
        if name not in parameters and value != defaults.get(name, value):
            raise OptionNotTakenError(f"model.{name}: the adapter's load_model does not take it; remove the key")
    return {name: value for name, value in arguments.items() if name in parameters}
