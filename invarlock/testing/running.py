"""One guard through the real pipeline, with a model in memory: passes, taps, prepare, edit, validate, the checks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from invarlock.config.schema import DatasetConfig, EditConfig, GuardsConfig, ModelConfig, RunConfig
from invarlock.core.results import GuardResult
from invarlock.datasets.layout import Windows
from invarlock.datasets.windows import make_windows
from invarlock.models.facts import task_of, vocabulary_of
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline.attempts import Edited
from invarlock.pipeline.changes import find_changes
from invarlock.pipeline.guarding import Guarding
from invarlock.pipeline.keeping import Keeper, Loaded
from invarlock.pipeline.planning.plans import plans_of
from invarlock.pipeline.session import Baseline, Session
from invarlock.plugins.catalog import Catalog, Selection
from invarlock.plugins.classes import ModelAdapter
from invarlock.plugins.manager import GuardSlot, PluginManager
from invarlock.plugins.plugin import Kind, Origin, Plugin
from invarlock.quantization import Plan, quantize_model
from invarlock.reporting.report import COMPARE
from invarlock.testing.named_edits import damage

Edit = Callable[[Any], object] | str | int | None
"""Function that changes the model in place, the name of an edit, bits to round to, or None for no edit."""

ADAPTER = "in_memory"
WINDOWS = 4
DATASET = DatasetConfig(seq_len=24, preview_n=4, final_n=WINDOWS)


def run_guard(guard: Any, model: torch.nn.Module, /, edit: Edit = None, **options: Any) -> GuardResult:
    """Let one guard judge an edit of a model, as ``invarlock run`` and ``invarlock compare`` would.

    The model writes windows of its own, passes over them before and after the edit with the guard's taps attached, and
    is watched for changes that the guard makes. Afterwards it is what it was before. The same call gives the same
    result.

    :param guard: a class with ``Guard`` as base, an instance of one, or a module or object with hook functions.
    :param model: as transformers' are; a causal, masked or sequence-to-sequence one.
    :param edit: a function of the model that changes it in place; the name of an edit (``invarlock.testing.damage``);
        how many bits to round its weights to, 2 to 8; or None for the unedited model.
    :param options: the guard's options, as in the section ``guards.NAME`` of a configuration.
    :returns: what it said; an exception, an incomplete result or a changed model is in ``error``, and aborts.
    :raises UsageError: the guard's hooks are wrong, or the edit is not known.
    """
    return GuardRun(guard, model, options).judge(edit)


@dataclass
class GuardRun:
    """A guard and a model, for several edits on the same windows; each time the guard is constructed anew."""

    guard: Any
    model: torch.nn.Module
    options: Mapping[str, Any] = field(default_factory=dict)
    observers: Mapping[str, Any] = field(default_factory=dict)
    """Plugins with wrappers, by name: they see what the guard is given and returns."""
    instance: Any = None
    """The guard that was asked last."""

    @cached_property
    def windows(self) -> tuple[Windows, Windows]:
        """Windows that the model writes before its first edit."""
        tokenizer = _Vocabulary(vocabulary_of(self.model))
        return make_windows(DATASET.counted(WINDOWS), self.model, tokenizer, task=task_of(self.model))

    def judge(self, edit: Edit = None) -> GuardResult:
        """The guard's result for an edit; see :func:`run_guard`."""
        session, slots = self._session(edit if isinstance(edit, int) else 8)
        model, adapter = session.load(ADAPTER)
        keeper = Keeper(Loaded.of(model, session.clock), adapter)
        guarding = Guarding(session, Baseline(session, model, adapter), self.windows, slots)
        try:
            guarding.begin(model, keeper.baseline)
            if not guarding.ready:
                return guarding.not_ready({}).guards[0]
            described = _apply(edit, model, session.config, keeper.snapshot)
            # A change is named; it need not be undone, for no other guard looks at the model.
            watched = keeper.baseline.edited(lambda: None)
            edited = Edited(model, watched, *described, baseline_weights=keeper.snapshot.parameters())
            return guarding.judge(edited).guards[0]
        finally:
            keeper.restore()

    def _session(self, bitwidth: int) -> tuple[Session, list[GuardSlot]]:
        name = _name_of(self.guard)
        config = RunConfig(
            model=ModelConfig(id=ADAPTER, adapter=ADAPTER),
            dataset=DATASET,
            edit=EditConfig(plan=Plan(bitwidth=bitwidth, scope="all")),
            guards=GuardsConfig(order=(name,), options={name: dict(self.options)}),
        )
        plugins = PluginManager(self._catalog(name))
        slots = plugins.guard_slots(config.guards.order, config.guards.options)
        return Session(config, plugins), slots

    def _catalog(self, name: str) -> Catalog:
        # Built-in tasks, and no other plugin that is installed.
        installed = Catalog.discover(Selection(autoload=False)).plugins
        catalog = Catalog([plugin for plugin in installed if "invarlock_tasks" in plugin.hooks])
        catalog.add(Plugin(ADAPTER, Kind.ADAPTER, Origin.LOCAL, __name__, factory=_InMemory(self.model)))
        for observer, wrappers in self.observers.items():
            catalog.add(Plugin(observer, Kind.HOOKS, Origin.LOCAL, __name__, factory=wrappers))
        self.instance = self.guard(**self.options) if inspect.isclass(self.guard) else self.guard
        catalog.add(Plugin(name, Kind.GUARD, Origin.LOCAL, name, factory=self.instance))
        return catalog


def _name_of(guard: Any) -> str:
    return str(getattr(guard, "name", "") or getattr(guard, "__name__", "") or type(guard).__name__)


def _apply(
    edit: Edit, model: torch.nn.Module, config: RunConfig, baseline: Snapshot
) -> tuple[str, dict[str, Any], Sequence[Any]]:
    """Make the edit; returns its name, its plan and its effect on each weight."""
    if isinstance(edit, int):
        (plan,) = plans_of(config)
        return config.edit.name, dataclasses.asdict(plan), quantize_model(model, plan)
    change = damage(model, edit) if isinstance(edit, str) else edit
    if change is not None:
        with torch.no_grad():
            change(model)
    return COMPARE, {"subject": ADAPTER}, find_changes(model, baseline.parameters()).tensors


class _InMemory(ModelAdapter):
    """Hands out a model that is there already."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        return self._model

    def load_tokenizer(self, model_id: str, **kwargs: Any) -> Any:
        return _Vocabulary(vocabulary_of(self._model))


class _Vocabulary:
    """A stand-in tokenizer with which a masked model writes its own windows: the last token is the mask."""

    eos_token_id: int | None = None

    def __init__(self, size: int) -> None:
        self.size = size
        self.mask_token_id: int | None = size - 1
        self.all_special_ids = [size - 1]

    def __len__(self) -> int:
        return self.size

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % (self.size - 1) for character in text]}
