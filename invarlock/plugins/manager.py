"""The typed face of the hooks: nobody else calls pluggy."""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pluggy

from invarlock import hookspecs
from invarlock.core.api import ModelAdapter, OptionNotTakenError
from invarlock.core.errors import PluginError, UsageError, nearest, one_line
from invarlock.core.ranks import PeerError
from invarlock.core.results import GuardResult, plain
from invarlock.core.sections import ReportSection
from invarlock.plugins.catalog import Catalog, Kind, Plugin, Selection, Status, hook_marks
from invarlock.plugins.observation import Observation
from invarlock.plugins.trace import trace_calls, trace_discovery

log = logging.getLogger("invarlock")


@dataclass(frozen=True)
class GuardSlot:
    """A guard at its place in ``guards.order``."""

    name: str
    plugin: Plugin
    instance: Any
    policy: Mapping[str, Any]

    @property
    def shares_work(self) -> bool:
        """Whether all processes of a run ask it (``Guard.shares_work``)."""
        return bool(getattr(self.instance, "shares_work", False))


@dataclass(frozen=True)
class Prepared:
    """What a guard's ``prepare`` returned, or how it failed."""

    returned: Mapping[str, Any] = field(default_factory=dict)
    message: str | None = None
    error: str | None = None
    """The traceback, or the message where there is none."""

    @property
    def ready(self) -> bool:
        return self.error is None and bool(self.returned.get("ready", True))


class PluginManager:
    """Plugins, and the hooks called on them."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._pluggy = pluggy.PluginManager("invarlock")
        self._pluggy.add_hookspecs(hookspecs)
        trace_calls(self._pluggy)
        # Registered first, so called last: pluggy calls the most recently registered plugin first.
        self._defaults = _DefaultAdapter()
        self._pluggy.register(self._defaults, "defaults")
        for plugin in catalog.plugins:
            self._register(plugin)

    @classmethod
    def load(cls, selection: Selection) -> PluginManager:
        """Discover and register plugins; those that fail are in the catalog with their error."""
        manager = cls(Catalog.discover(selection))
        trace_discovery(manager.catalog.plugins)
        return manager

    def add(self, modules: Sequence[str], blocked: frozenset[str] = frozenset()) -> None:
        """Load what ``plugins:`` of a configuration names."""
        for name in modules:
            known = self.catalog.named(name)
            if name in blocked:
                log.warning("plugins: %s is blocked by -p no:%s", name, name)
            elif known:
                for plugin in known:
                    plugin.require_ready()
            else:
                added = self.catalog.add_local(name)
                trace_discovery(added)
                for plugin in added:
                    self._register(plugin)

    def _register(self, plugin: Plugin) -> None:
        # Guards of the class form are registered when a run gives them their options. One module can stand behind two
        # entry points, and is registered once.
        waits_for_options = plugin.kind is Kind.GUARD and plugin.is_class
        if plugin.instance is None or waits_for_options or self._pluggy.is_registered(plugin.instance):
            return
        if plugin.status is Status.READY:
            self._pluggy.register(plugin.instance, plugin.label)

    # -- commands ------------------------------------------------------------------------------------------------------

    def add_commands(self, subparsers: Any) -> None:
        for plugin, hook in self._each("invarlock_add_commands"):
            try:
                hook(subparsers=subparsers)
            except Exception as error:
                log.warning("%s: invarlock_add_commands: %s", plugin, one_line(error))

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_model(self, adapter: str, model_id: str, device: str, options: Mapping[str, Any]) -> tuple[Any, Adapter]:
        """Load a model through the adapter of a name, or with ``auto`` through the first that owns the id.

        :raises UsageError: when no adapter loads it; the message holds each one's reason.
        """
        if adapter != "auto":
            plugin = self.catalog.get(adapter, Kind.ADAPTER, "model.adapter")
            try:
                model = self._only("invarlock_load_model", plugin.instance)(
                    model_id=model_id, device=device, options=options
                )
            except (UsageError, PeerError):
                raise
            except OSError as error:
                raise UsageError(f"adapter {adapter}: model.id: {error}") from error
            except Exception as error:
                raise PluginError(f"adapter {adapter}: load_model: {one_line(error)}") from error
            if model is None:
                raise UsageError(f"adapter {adapter}: model.id: it does not load {model_id}; try model.adapter: auto")
            return model, Adapter(self, plugin)
        return self._ask_every_adapter(model_id, device, options)

    def _ask_every_adapter(self, model_id: str, device: str, options: Mapping[str, Any]) -> tuple[Any, Adapter]:
        reasons = []
        by_instance = {id(plugin.instance): plugin for plugin in self.catalog.of_kind(Kind.ADAPTER)}
        for instance in self._in_call_order("invarlock_load_model"):
            if id(instance) not in by_instance:
                continue
            plugin = by_instance[id(instance)]
            try:
                model = self._only("invarlock_load_model", instance)(model_id=model_id, device=device, options=options)
            except OptionNotTakenError as error:
                reasons.append(f"{plugin.name}: {one_line(error)}")
            except (UsageError, PeerError):
                raise
            except Exception as error:
                log.warning("adapter %s: load_model: %s; asking the next one", plugin.name, one_line(error))
                reasons.append(f"{plugin.name}: {one_line(error)}")
            else:
                if model is not None:
                    return model, Adapter(self, plugin)
                reasons.append(f"{plugin.name} does not own it")
        raise UsageError(f"model.id: no adapter loads {model_id} ({'; '.join(reasons)})")

    # -- guards --------------------------------------------------------------------------------------------------------

    def guard_slots(self, order: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[GuardSlot]:
        """Construct and register the guards of a run, in order.

        :raises UsageError: for an unknown guard or option, with the nearest one.
        """
        for name in options:
            if not self.catalog.named(name, Kind.GUARD):
                known = [plugin.name for plugin in self.catalog.of_kind(Kind.GUARD)]
                raise UsageError(f"guards.{name}: there is no guard {name!r}{nearest(name, known)}")
            if name not in order:
                log.warning("guards.%s: has options, but is not in guards.order: the guard is skipped", name)
        slots = []
        for place, name in enumerate(order):
            policy = dict(options.get(name, {}))
            plugin = self.catalog.find(name, Kind.GUARD, "guards.order")
            instance = _construct(plugin, policy)
            if not self._pluggy.is_registered(instance):
                self._pluggy.register(instance, f"{plugin.label} at guards.order.{place}")
            slots.append(GuardSlot(name, plugin, instance, policy))
        return slots

    def observe(self, slot: GuardSlot, model: Any, adapter: Adapter) -> Observation:
        hook = self._only("invarlock_observe", slot.instance)
        observation = Observation()
        try:
            observation.wanted = hook(model=model, adapter=adapter, policy=slot.policy, guard=slot.name) or {}
            unknown = observation.wanted.keys() - dict(model.named_modules()).keys()
            if unknown:
                raise PluginError(f"the model has no module {', '.join(sorted(unknown))}")
        except Exception as error:
            observation.wanted = {}
            observation.fail("observe", error)
        return observation

    def prepare(self, slot: GuardSlot, model: Any, adapter: Adapter, calib: Any) -> Prepared:
        hook = self._only("invarlock_prepare", slot.instance)
        try:
            returned = hook(model=model, adapter=adapter, calib=calib, policy=slot.policy, guard=slot.name)
        except Exception as error:
            return Prepared(message=f"prepare: {one_line(error)}", error=traceback.format_exc())
        if returned is not None and not isinstance(returned, Mapping):
            message = f"prepare returned {type(returned).__name__}, not a dict with 'ready'"
            return Prepared(message=message, error=message)
        return Prepared(plain(returned or {}))

    def validate(self, slot: GuardSlot, model: Any, adapter: Adapter, context: Mapping[str, Any]) -> GuardResult:
        hook = self._only("invarlock_validate", slot.instance)
        try:
            returned = hook(model=model, adapter=adapter, context={**context, "policy": slot.policy}, guard=slot.name)
        except Exception as error:
            return GuardResult.failed(slot.name, one_line(error), traceback.format_exc())
        return GuardResult.from_plugin(slot.name, returned)

    # -- the report ----------------------------------------------------------------------------------------------------

    def attempt_finished(self, attempt: int, report: dict[str, Any]) -> None:
        self._tell("invarlock_attempt_finished", attempt=attempt, report=report)

    def run_finished(self, report: dict[str, Any]) -> None:
        self._tell("invarlock_run_finished", report=report)

    def _tell(self, name: str, **arguments: Any) -> None:
        """Call every implementation of a hook that returns nothing.

        :raises PluginError: one of them failed.
        """
        for plugin, hook in self._each(name):
            try:
                hook(**arguments)
            except Exception as error:
                raise PluginError(f"{plugin}: {name}: {one_line(error)}") from error

    def report_sections(self, report: dict[str, Any]) -> list[ReportSection]:
        found: list[ReportSection] = []
        for plugin, hook in self._each("invarlock_report_sections"):
            try:
                for returned in hook(report=report):
                    found += [ReportSection.from_plugin(plugin, section) for section in returned]
            except Exception as error:
                raise PluginError(f"{plugin}: invarlock_report_sections: {one_line(error)}") from error
        return found

    # -- how hooks are called ------------------------------------------------------------------------------------------

    def _only(self, hook: str, *instances: Any) -> pluggy.HookCaller:
        """A hook that reaches these plugins and every wrapper, and nobody else."""
        others = [
            plugin
            for plugin in self._pluggy.get_plugins()
            if not any(plugin is instance for instance in instances) and not _wraps(plugin, hook)
        ]
        return self._pluggy.subset_hook_caller(hook, others)

    def _each(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Each implementation by itself, with its plugin's name, so that a failure can be laid at its door."""
        for instance in self._in_call_order(hook):
            yield self._pluggy.get_name(instance) or repr(instance), self._only(hook, instance)

    def _in_call_order(self, hook: str) -> list[Any]:
        implementations = reversed(getattr(self._pluggy.hook, hook).get_hookimpls())
        return [implementation.plugin for implementation in implementations if not implementation.wrapper]


def _wraps(plugin: Any, hook: str) -> bool:
    marks = hook_marks(getattr(plugin, hook, None))
    return marks is not None and bool(marks.get("wrapper") or marks.get("hookwrapper"))


def _construct(plugin: Plugin, options: Mapping[str, Any]) -> Any:
    """A guard with its options; of a module or object the options are its policy alone."""
    if not plugin.is_class:
        plugin.require_ready()
        return plugin.instance
    # A class with required options is listed as broken, since it cannot be constructed without them; here it may be.
    if not plugin.options_missing:
        plugin.require_ready()
    accepted = inspect.signature(plugin.factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for name in options:
        if name not in accepted and not takes_any:
            known = f"; it takes {', '.join(accepted)}" if accepted else "; it takes no options"
            raise UsageError(
                f"guards.{plugin.name}.{name}: the guard has no such option{nearest(name, accepted)}{known}"
            )
    try:
        return plugin.factory(**options)
    except UsageError as error:
        raise UsageError(f"guards.{plugin.name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"guards.{plugin.name}: cannot be constructed: {one_line(error)}") from error
    except Exception as error:
        raise PluginError(f"guard {plugin.name}: cannot be constructed: {one_line(error)}") from error


class _DefaultAdapter(ModelAdapter):
    """Answers the hooks that an adapter in the form of a module leaves out."""

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> None:
        return None


class Adapter:
    """The adapter that loaded a model, as guards and the pipeline see it, whatever its form.

    Attributes beyond the methods of ``ModelAdapter`` are those of the plugin itself.
    """

    def __init__(self, manager: PluginManager, plugin: Plugin) -> None:
        self._manager = manager
        self._plugin = plugin
        self.name = plugin.name

    def load_tokenizer(self, model_id: str, **options: Any) -> Any:
        return self._call("invarlock_load_tokenizer", model_id=model_id, options=options)

    def describe(self, model: Any) -> dict[str, Any]:
        description: dict[str, Any] = plain(self._call("invarlock_describe", model=model))
        return description

    def snapshot(self, model: Any) -> Any:
        return self._call("invarlock_snapshot", model=model)

    def restore(self, model: Any, snapshot: Any) -> None:
        self._call("invarlock_restore", model=model, snapshot=snapshot)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._plugin.instance, name)

    def _call(self, hook: str, **arguments: Any) -> Any:
        # The default is registered first, so an adapter that implements the hook is asked before it.
        caller = self._manager._only(hook, self._plugin.instance, self._manager._defaults)
        try:
            return caller(**arguments)
        except (UsageError, PluginError):
            raise
        except Exception as error:
            raise PluginError(f"adapter {self.name}: {hook}: {one_line(error)}") from error
