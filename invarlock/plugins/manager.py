"""The typed face of the hooks: nobody else calls pluggy."""

from __future__ import annotations

import copy
import logging
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pluggy

from invarlock import hookspecs
from invarlock.core.errors import (
    InputError,
    InvarlockError,
    PeerError,
    PluginError,
    UsageError,
    contained,
    located,
    one_line,
    unknown,
)
from invarlock.core.results import GuardResult, PrepareResult
from invarlock.core.sections import ReportSection, extra_from_plugin
from invarlock.plugins.adapter import Adapter, DefaultAdapter
from invarlock.plugins.catalog import Catalog, Selection
from invarlock.plugins.checking import is_wrapper
from invarlock.plugins.classes import Guard, OptionNotTakenError
from invarlock.plugins.construction import construct
from invarlock.plugins.contributions import Contribution, Documents, add_contributions
from invarlock.plugins.faults import Faults, Threads
from invarlock.plugins.observation import Observation, taps_of
from invarlock.plugins.plugin import Kind, Origin, Plugin, Status
from invarlock.plugins.trace import trace_calls, trace_discovery

log = logging.getLogger("invarlock")


@dataclass(frozen=True)
class GuardSlot:
    """A guard at its place in ``guards.order``."""

    name: str
    plugin: Plugin
    instance: Any
    policy: Mapping[str, Any]
    shares_work: bool
    """As ``Guard.shares_work``: all processes of a run ask it."""


class PluginManager:
    """Plugins, and the hooks called on them."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._pluggy = pluggy.PluginManager("invarlock")
        self._pluggy.add_hookspecs(hookspecs)
        trace_calls(self._pluggy)
        self.faults = Faults()
        """Of wrappers and threads while guards were asked; whoever folds a verdict takes them."""
        self.threads = Threads(self.faults)
        self._commands: list[Contribution] = []
        # Registered first, so called last: pluggy calls the most recently registered plugin first.
        self._defaults = DefaultAdapter()
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
            known = [plugin for plugin in self.catalog.named(name) if not plugin.is_own_hooks]
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
        if plugin.status is Status.READY and plugin.instance is not None and not waits_for_options:
            try:
                with contained():
                    self._admit(plugin.instance, plugin.label)
            except Exception as error:
                plugin.fail_of(error, f"cannot be registered: {one_line(error)}")

    def _admit(self, instance: Any, name: str) -> None:
        """Register what implements hooks, if it is not yet, and hold its wrappers to account."""
        if self._pluggy.is_registered(instance):
            return
        self._pluggy.register(instance, name)
        for caller in self._pluggy.get_hookcallers(instance) or ():
            for implementation in caller.get_hookimpls():
                if implementation.plugin is instance and implementation.wrapper:
                    around = self.faults.accountable(name, caller.name, implementation.function)
                    implementation.function = around  # type: ignore[misc]

    @contextmanager
    def _turn(self, plugin: str) -> Iterator[None]:
        """Ask a plugin in the block: what leaves it is an ``Exception``, or Ctrl-C.

        The working folder is what it was afterwards: paths of the configuration are relative to it.
        """
        folder = os.open(".", os.O_RDONLY)
        try:
            with self.threads.of(plugin), contained():
                yield
        finally:
            os.fchdir(folder)
            os.close(folder)

    @contextmanager
    def _answering(self, plugin: str, hook: str, file: str | None = None) -> Iterator[None]:
        """Ask a plugin for what nobody can do without; PluginError where it or a wrapper around it fails."""
        try:
            with self._turn(plugin):
                yield
        except (UsageError, PluginError):
            raise
        except Exception as error:
            raise PluginError(f"{plugin}: {hook}: {located(error, file)}") from error
        if faults := self.faults.take():
            raise PluginError("; ".join(f"{fault.source}: {fault.message}" for fault in faults))

    # -- commands, exporters, report formats ---------------------------------------------------------------------------

    def add_commands(self, subparsers: Any) -> None:
        """Let each plugin add its commands, built-ins first: a name that is taken is an error of the later one."""
        for plugin, hook in self._built_ins_first("invarlock_add_commands"):
            known = set(subparsers.choices)
            try:
                with self._answering(plugin, "invarlock_add_commands"):
                    hook(subparsers=subparsers)
            except InvarlockError as error:
                self._unsound(plugin, one_line(error))
            added = [name for name in subparsers.choices if name not in known]
            self._commands += [Contribution(Kind.COMMAND, name, plugin) for name in added]

    def exporters(self, wanted: str | None = None) -> dict[str, Contribution]:
        """Formats of a saved model by name; once the wanted one is found no more plugins are asked, which may fail."""
        return self._contributed(Kind.EXPORTER, "invarlock_exporters", wanted)

    def report_formats(self) -> dict[str, Contribution]:
        """Formats of a report by name, as ``report --format`` has them; PluginError where a plugin fails."""
        return self._contributed(Kind.REPORT_FORMAT, "invarlock_report_formats")

    def tasks(self) -> dict[str, Contribution]:
        """Tasks by name, built-ins first."""
        return self._contributed(Kind.TASK, "invarlock_tasks")

    def _contributed(self, kind: Kind, hook: str, wanted: str | None = None) -> dict[str, Contribution]:
        found: dict[str, Contribution] = {}
        built_in = {plugin.label for plugin in self.catalog.plugins if plugin.origin is Origin.BUILTIN}
        for plugin, ask in self._built_ins_first(hook):
            asking = None if plugin in built_in else partial(self._answering, plugin, kind)
            with self._answering(plugin, hook):
                for returned in ask():
                    add_contributions(found, kind, plugin, returned, asking)
            if wanted in found:
                break
        return found

    def brought(self) -> list[Plugin]:
        """Contributions of plugins, as a plugin each; a failed hook is logged as a warning."""
        found = [*self._commands, *(Contribution(Kind.PROVIDER, each.name, each.label) for each in self._providers())]
        for collect in (self.tasks, self.exporters, self.report_formats):
            try:
                found += collect().values()
            except InvarlockError as error:
                log.warning("%s", one_line(error))
        return [each.of(plugin) for each in found for plugin in self.catalog.plugins if plugin.label == each.plugin]

    def _unsound(self, label: str, what: str) -> None:
        """A plugin that failed while the command line was read: listed so, and told to whoever asked for it."""
        for plugin in self.catalog.plugins:
            if plugin.label == label:
                plugin.fail(what)
                if plugin.origin is not Origin.LOCAL:
                    return
        log.warning("%s", what)

    # -- documents -----------------------------------------------------------------------------------------------------

    def documents(self, dataset: Any) -> Documents:
        """The text of a dataset, of the first plugin that owns its provider.

        :raises UsageError: nobody owns it, with the nearest name; or the provider cannot read it.
        :raises PluginError: the provider failed.
        """
        for plugin, hook in self._each("invarlock_documents"):
            asking = partial(self._answering, plugin, "invarlock_documents")
            with asking():
                returned = hook(dataset=dataset)
            if returned is not None:
                return Documents(plugin, returned, asking)
        known = ["generated", *(plugin.name for plugin in self._providers())]
        raise UsageError(f"dataset.provider: {unknown('provider', dataset.provider, known)}")

    def _providers(self) -> list[Plugin]:
        ready = (plugin for plugin in self.catalog.plugins if plugin.status is Status.READY)
        return [plugin for plugin in ready if "invarlock_documents" in plugin.hooks]

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_model(self, adapter: str, model_id: str, device: str, options: Mapping[str, Any]) -> tuple[Any, Adapter]:
        """Load a model through the adapter of a name, or with ``auto`` through the first that owns the id.

        :raises UsageError: when no adapter loads it; the message holds each one's reason.
        """
        if adapter != "auto":
            plugin = self.catalog.get(adapter, Kind.ADAPTER, "model.adapter")
            with self._answering(plugin.label, "load_model", plugin.file):
                try:
                    model = self._loaded_by(plugin, model_id, device, options)
                except OSError as error:
                    raise InputError(f"adapter {adapter}: {error}") from error
            if model is None:
                raise InputError(f"adapter {adapter} does not load {model_id}; try model.adapter: auto")
            return model, Adapter(plugin, self._ask_adapter)
        return self._ask_every_adapter(model_id, device, options)

    def _ask_every_adapter(self, model_id: str, device: str, options: Mapping[str, Any]) -> tuple[Any, Adapter]:
        known = self.catalog.of_kind(Kind.ADAPTER)
        # First: one that lacks its library may be the one that would own it.
        reasons = [f"{plugin.name} {plugin.error}" for plugin in known if plugin.status is Status.MISSING]
        adapters = {id(plugin.instance): plugin for plugin in known}
        called = [id(instance) for instance in self._in_call_order("invarlock_load_model")]
        for plugin in [adapters[instance] for instance in called if instance in adapters]:
            try:
                with self._turn(plugin.label):
                    model = self._loaded_by(plugin, model_id, device, options)
            except OptionNotTakenError as error:
                reasons.append(f"{plugin.name}: {one_line(error)}")
            except (UsageError, PeerError):
                raise
            except Exception as error:
                log.warning("adapter %s: load_model: %s; asking the next one", plugin.name, one_line(error))
                reasons.append(f"{plugin.name}: {one_line(error)}")
            else:
                with self._answering(plugin.label, "load_model"):
                    if model is not None:
                        return model, Adapter(plugin, self._ask_adapter)
                reasons.append(f"{plugin.name} does not own it")
        raise InputError(f"no adapter loads {model_id} ({'; '.join(reasons)})")

    def _loaded_by(self, plugin: Plugin, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        # A copy: what one adapter changes of the options is nothing that the next one may see.
        load = self._only("invarlock_load_model", plugin.instance)
        return load(model_id=model_id, device=device, options=dict(options))

    def _ask_adapter(self, plugin: Plugin, hook: str, /, **arguments: Any) -> Any:
        # The default is registered first, so an adapter that implements the hook is asked before it.
        caller = self._only(hook, plugin.instance, self._defaults)
        with self._answering(plugin.label, hook, plugin.file):
            return caller(**arguments)

    # -- guards --------------------------------------------------------------------------------------------------------

    def guard_slots(self, order: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[GuardSlot]:
        """Construct and register the guards of a run, in order.

        :raises UsageError: for an unknown guard or option, with the nearest one.
        """
        for name in options:
            self.catalog.find(name, Kind.GUARD, f"guards.{name}")
            if name not in order:
                log.warning("guards.%s: has options, but is not in guards.order: the guard is skipped", name)
        slots = []
        for place, name in enumerate(order):
            policy = copy.deepcopy(dict(options.get(name, {})))
            plugin = self.catalog.find(name, Kind.GUARD, "guards.order")
            with self._answering(plugin.label, "registration", plugin.file):
                instance = construct(plugin, policy)
                self._admit(instance, f"{plugin.label} at guards.order.{place}")
                shares_work = bool(getattr(instance, "shares_work", False))
            slots.append(GuardSlot(name, plugin, instance, policy, shares_work))
        return slots

    def watches(self, slot: GuardSlot) -> bool:
        """True if there is code of others, and a guard, or a wrapper around it, has an ``observe`` of its own."""
        implementations = self._only("invarlock_observe", slot.instance).get_hookimpls()
        default = getattr(getattr(slot.instance, "observe", None), "__func__", None) is Guard.observe
        own = any(implementation.plugin is not slot.instance or not default for implementation in implementations)
        return own and self.catalog.has_strangers

    def observe(self, slot: GuardSlot, model: Any, adapter: Adapter) -> Observation:
        observation = Observation()
        try:
            with self._asking(slot, "invarlock_observe", adapter) as ask:
                observation.wanted = taps_of(ask(model=model, policy=copy.deepcopy(slot.policy)))
            missing = observation.wanted.keys() - dict(model.named_modules()).keys()
            if missing:
                raise PluginError(f"the model has no module {', '.join(sorted(missing))}")
        except Exception as error:
            observation.wanted = {}
            observation.fail("observe", error)
        return observation

    def prepare(self, slot: GuardSlot, model: Any, adapter: Adapter, calib: Any) -> PrepareResult:
        try:
            with self._asking(slot, "invarlock_prepare", adapter) as ask:
                return PrepareResult.from_plugin(ask(model=model, calib=calib, policy=copy.deepcopy(slot.policy)))
        except Exception as error:
            return PrepareResult.failed(f"prepare: {located(error, slot.plugin.file)}", traceback.format_exc())

    def validate(self, slot: GuardSlot, model: Any, adapter: Adapter, context: Mapping[str, Any]) -> GuardResult:
        try:
            with self._asking(slot, "invarlock_validate", adapter) as ask:
                own = {**context, "policy": copy.deepcopy(slot.policy)}
                return GuardResult.from_plugin(slot.name, ask(model=model, context=own))
        except Exception as error:
            return GuardResult.failed(slot.name, located(error, slot.plugin.file), traceback.format_exc())

    @contextmanager
    def _asking(self, slot: GuardSlot, hook: str, adapter: Adapter) -> Iterator[Callable[..., Any]]:
        """A hook of one guard, to be called and its answer read in the block: reading can call the guard's code."""
        with self._turn(slot.plugin.label):
            yield partial(self._only(hook, slot.instance), adapter=copy.copy(adapter), guard=slot.name)

    # -- the report ----------------------------------------------------------------------------------------------------

    def attempt_finished(self, attempt: int, report: dict[str, Any]) -> None:
        """:raises PluginError: a plugin failed."""
        for plugin, hook in self._each("invarlock_attempt_finished"):
            with self._answering(plugin, "invarlock_attempt_finished"):
                hook(attempt=attempt, report=copy.deepcopy(report))

    def run_finished(self, report: dict[str, Any]) -> dict[str, Any]:
        """Additions of all plugins to a report, below ``extra``.

        :raises PluginError: one of them failed.
        """
        extra: dict[str, Any] = {}
        for plugin, hook in self._each("invarlock_run_finished"):
            with self._answering(plugin, "invarlock_run_finished"):
                shown = copy.deepcopy(report)
                for returned in hook(report=shown):
                    extra |= extra_from_plugin(returned)
                extra |= extra_from_plugin(shown.get("extra"))
        return extra

    def report_sections(self, report: dict[str, Any]) -> list[ReportSection]:
        """:raises PluginError: a plugin failed, or a section is not of that form."""
        found: list[ReportSection] = []
        for plugin, hook in self._each("invarlock_report_sections"):
            with self._answering(plugin, "invarlock_report_sections"):
                for returned in hook(report=copy.deepcopy(report)):
                    found += ReportSection.all_from_plugin(plugin, returned)
        return found

    def that_saw_the_end(self) -> list[str]:
        """The plugins that look at attempts and reports."""
        hooks = ("invarlock_attempt_finished", "invarlock_run_finished", "invarlock_report_sections")
        return list(dict.fromkeys(plugin for hook in hooks for plugin, _ in self._each(hook)))

    # -- how hooks are called ------------------------------------------------------------------------------------------

    def _only(self, hook: str, *instances: Any) -> pluggy.HookCaller:
        """A hook that reaches these plugins and every wrapper, and nobody else."""
        others = [
            plugin
            for plugin in self._pluggy.get_plugins()
            if not any(plugin is instance for instance in instances) and not is_wrapper(getattr(plugin, hook, None))
        ]
        return self._pluggy.subset_hook_caller(hook, others)

    def _each(self, hook: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Each implementation by itself, with its plugin's name, so that a failure can be laid at its door."""
        for instance in self._in_call_order(hook):
            yield self._pluggy.get_name(instance) or repr(instance), self._only(hook, instance)

    def _built_ins_first(self, hook: str) -> list[tuple[str, Callable[..., Any]]]:
        return list(self._each(hook))[::-1]

    def _in_call_order(self, hook: str) -> list[Any]:
        implementations = reversed(getattr(self._pluggy.hook, hook).get_hookimpls())
        return [implementation.plugin for implementation in implementations if not implementation.wrapper]
