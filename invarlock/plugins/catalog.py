"""Which plugins there are: entry points, modules named with ``-p``, and the one edit; each with its state."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from types import ModuleType
from typing import Any

from invarlock import __version__, hookspecs
from invarlock.core.api import Guard, ModelAdapter
from invarlock.core.errors import UsageError, nearest, one_line

OWN_DISTRIBUTION = "invarlock"


class Kind(StrEnum):
    ADAPTER = "adapter"
    EDIT = "edit"
    GUARD = "guard"
    HOOKS = "hooks"
    """Neither loads nor judges: wrappers, commands, readers of the report."""


class Origin(StrEnum):
    BUILTIN = "builtin"
    PLUGIN = "plugin"
    LOCAL = "local"
    """Named with ``-p`` or ``plugins:``, not installed."""


class Status(StrEnum):
    READY = "ready"
    MISSING = "missing"
    """It needs a distribution that is not installed."""
    ERROR = "error"
    """It does not import, cannot be constructed, or its hooks are wrong."""
    BLOCKED = "blocked"
    """Turned off with ``-p no:NAME``; it was not imported."""


GROUPS = {Kind.GUARD: "invarlock.guards", Kind.ADAPTER: "invarlock.adapters", Kind.HOOKS: "invarlock.hooks"}
BASES: dict[Kind, type] = {Kind.GUARD: Guard, Kind.ADAPTER: ModelAdapter}


@dataclass
class Plugin:
    """One plugin, ready or not, and why not."""

    name: str
    kind: Kind
    origin: Origin
    module: str
    attribute: str = ""
    distribution: str | None = None
    version: str | None = None
    status: Status = Status.READY
    error: str | None = None
    trace: str | None = None
    factory: Any = None
    """A class of the class form, or a module or object with hook implementations."""
    instance: Any = None
    """What is registered for hook calls: made from a class without options, or the module or object itself."""
    requires: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.kind} {self.name}"

    @property
    def entry_point(self) -> str | None:
        group = GROUPS.get(self.kind)
        if group is None or self.origin is Origin.LOCAL:
            return None
        return f"{group}: {self.name} = {self.module}" + (f":{self.attribute}" if self.attribute else "")

    @property
    def is_class(self) -> bool:
        return inspect.isclass(self.factory)

    @property
    def options_missing(self) -> bool:
        """Whether all that keeps a class from being ready are options that only a configuration can give."""
        derived = self.is_class and issubclass(self.factory, Guard | ModelAdapter)
        return derived and self.instance is None and self.status is Status.ERROR

    def fail(self, error: str, status: Status = Status.ERROR, trace: str | None = None) -> None:
        self.status, self.error, self.trace = status, error, trace

    def require_ready(self) -> None:
        """:raises UsageError: when somebody asked by name for a plugin that cannot be used."""
        if self.status is not Status.READY:
            raise UsageError(f"{self.label} is {_WHY[self.status]}: {self.error}")


_WHY = {Status.MISSING: "not usable here", Status.ERROR: "broken", Status.BLOCKED: "blocked"}


@dataclass(frozen=True)
class Selection:
    """What the command line says of plugins, read before anything is imported."""

    modules: tuple[str, ...] = ()
    blocked: frozenset[str] = frozenset()
    autoload: bool = True

    @classmethod
    def of(cls, names: Iterable[str], *, autoload: bool) -> Selection:
        """Split ``-p`` values into those to load and, as ``no:NAME``, those to block."""
        names = tuple(names)
        blocked = frozenset(name.removeprefix("no:") for name in names if name.startswith("no:"))
        modules = tuple(dict.fromkeys(name for name in names if not name.startswith("no:")))
        return cls(tuple(name for name in modules if name not in blocked), blocked, autoload)


@dataclass
class Catalog:
    """Every plugin there is, built-ins first, then installed ones, then local ones; each group by name."""

    plugins: list[Plugin] = field(default_factory=list)

    @classmethod
    def discover(cls, selection: Selection) -> Catalog:
        """Find and import plugins.

        :raises UsageError: when a module named with ``-p`` or a name to block does not exist.
        """
        installed = list(_installed())
        named = {plugin.name for plugin in installed} & set(selection.modules)
        found = [
            plugin
            for plugin in installed
            if plugin.origin is Origin.BUILTIN or selection.autoload or plugin.name in named
        ]
        catalog = cls([_edit(), *found])
        _settle_conflicts(catalog.plugins)
        _block(catalog.plugins, installed, selection)
        for plugin in found:
            if plugin.status is Status.READY:
                _load(plugin)
        for name in selection.modules:
            if name in named:
                for plugin in catalog.named(name):
                    plugin.require_ready()
            else:
                catalog.add_local(name, installed)
        return catalog

    def add_local(self, name: str, installed: Iterable[Plugin] = ()) -> list[Plugin]:
        """Import a module that somebody named, and take what it holds as plugins."""
        module = _import_local(name, [plugin.name for plugin in installed])
        added = list(_local_plugins(name, module))
        for plugin in added:
            self.add(plugin)
        return added

    def add(self, plugin: Plugin) -> None:
        """Take in a plugin that is there already, as ``factory``.

        :raises UsageError: it cannot be used.
        """
        _check(plugin)
        plugin.require_ready()
        self.plugins.append(plugin)

    def named(self, name: str, *kinds: Kind) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.name == name and (not kinds or plugin.kind in kinds)]

    def of_kind(self, *kinds: Kind) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.kind in kinds]

    def find(self, name: str, kind: Kind, where: str) -> Plugin:
        """The plugin of a name and kind, ready or not.

        :raises UsageError: when there is none, with the nearest name.
        """
        found = self.named(name, kind)
        if not found:
            known = [plugin.name for plugin in self.of_kind(kind)]
            hint = nearest(name, known) or f"; known are {', '.join(sorted(known))}"
            raise UsageError(f"{where}: there is no {kind} {name!r}{hint}")
        return found[0]

    def get(self, name: str, kind: Kind, where: str) -> Plugin:
        """The plugin of a name and kind.

        :raises UsageError: when there is none, with the nearest name, or when it cannot be used.
        """
        plugin = self.find(name, kind, where)
        plugin.require_ready()
        return plugin


def _installed() -> Iterator[Plugin]:
    """Plugins by their entry points: built-ins first, then by name, so that no file system decides an order."""
    seen: set[tuple[str, str, str]] = set()
    plugins = []
    for kind, group in GROUPS.items():
        for entry in importlib.metadata.entry_points(group=group):
            distribution = entry.dist.name if entry.dist else None
            key = (group, entry.name, f"{distribution} {entry.value}")
            if key in seen:  # An editable install beside a built one lists the same entry point twice.
                continue
            seen.add(key)
            origin = Origin.BUILTIN if distribution == OWN_DISTRIBUTION else Origin.PLUGIN
            version = entry.dist.version if entry.dist else None
            plugins.append(Plugin(entry.name, kind, origin, entry.module, entry.attr or "", distribution, version))
    order = [Origin.BUILTIN, Origin.PLUGIN]
    yield from sorted(plugins, key=lambda p: (order.index(p.origin), p.kind, p.name, p.distribution or ""))


def _edit() -> Plugin:
    return Plugin("quant_rtn", Kind.EDIT, Origin.BUILTIN, "invarlock.quantization", "", OWN_DISTRIBUTION, __version__)


def _settle_conflicts(plugins: list[Plugin]) -> None:
    """Two distributions that claim one name: a built-in stays, else neither is used, and both are named."""
    by_name: dict[tuple[Kind, str], list[Plugin]] = {}
    for plugin in plugins:
        by_name.setdefault((plugin.kind, plugin.name), []).append(plugin)
    for rivals in by_name.values():
        if len(rivals) > 1:
            who = " and ".join(f"{rival.distribution} {rival.version}" for rival in rivals)
            for plugin in rivals:
                if plugin.origin is not Origin.BUILTIN:
                    plugin.fail(f"the name is claimed by {who}; uninstall one of them")


def _block(plugins: list[Plugin], installed: list[Plugin], selection: Selection) -> None:
    known = {plugin.name for plugin in [*plugins, *installed]}
    for name in sorted(selection.blocked - known):
        # Blocking what is not there keeps one command line good for several machines, but a typo must be seen.
        hint = nearest(name, known)
        if hint:
            raise UsageError(f"-p no:{name}: there is no plugin {name!r}{hint}")
    for plugin in plugins:
        if plugin.name in selection.blocked:
            plugin.fail(f"blocked by -p no:{plugin.name}", Status.BLOCKED)


def _load(plugin: Plugin) -> None:
    """Import an installed plugin; whatever goes wrong becomes its state, and hurts nobody else."""
    try:
        plugin.factory = importlib.import_module(plugin.module)
        for part in filter(None, plugin.attribute.split(".")):
            plugin.factory = getattr(plugin.factory, part)
    except Exception as error:
        plugin.fail(one_line(error), trace=traceback.format_exc())
    else:
        _check(plugin)


def _import_local(name: str, known: Iterable[str]) -> ModuleType:
    # Last on the path: a file of the working folder must not take the place of an installed module.
    if "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            hint = nearest(name, known)
            raise UsageError(f"-p {name}: there is no plugin and no module of that name{hint}") from None
        raise UsageError(f"-p {name}: does not import: {one_line(error)}") from error
    except Exception as error:
        raise UsageError(f"-p {name}: does not import: {one_line(error)}") from error


def _local_plugins(name: str, module: ModuleType) -> Iterator[Plugin]:
    """The classes that a module defines, each under its own name, and the module itself if it implements hooks."""
    for attribute, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, Guard | ModelAdapter):
            kind = Kind.GUARD if issubclass(value, Guard) else Kind.ADAPTER
            yield Plugin(value.name or attribute, kind, Origin.LOCAL, name, attribute, factory=value)
    if any(attribute.startswith("invarlock_") for attribute in vars(module)):
        plugin = Plugin(name, Kind.HOOKS, Origin.LOCAL, name, factory=module)
        judges = any(_is_plain_hook(module, hook) for hook in ("invarlock_prepare", "invarlock_validate"))
        if judges:
            plugin.kind = Kind.GUARD
        elif _is_plain_hook(module, "invarlock_load_model"):
            plugin.kind = Kind.ADAPTER
        yield plugin


def _is_plain_hook(owner: Any, name: str) -> bool:
    marks = hook_marks(getattr(owner, name, None))
    return marks is not None and not marks.get("wrapper") and not marks.get("hookwrapper")


def hook_marks(function: Any) -> dict[str, Any] | None:
    """What ``@hookimpl`` left on a function; None when it is not marked."""
    return getattr(function, "invarlock_impl", None)


HOOKS = tuple(name for name in vars(hookspecs) if name.startswith("invarlock_"))


def _check(plugin: Plugin) -> None:
    """Find out whether an imported plugin can be used, and make the instance that hook calls reach."""
    plugin.requires = tuple(getattr(plugin.factory, "requires", ()))
    missing = [name for name in plugin.requires if not _is_installed(name)]
    if missing:
        plugin.fail(f"needs {' '.join(missing)}: pip install {' '.join(missing)}", Status.MISSING)
        return
    if plugin.is_class:
        base = BASES.get(plugin.kind)
        if base and not issubclass(plugin.factory, base):
            plugin.fail(f"the class {plugin.factory.__name__} is not derived from invarlock.core.api.{base.__name__}")
            return
        try:
            plugin.instance = plugin.factory()
        except Exception as error:
            plugin.fail(f"cannot be constructed without options: {one_line(error)}", trace=traceback.format_exc())
            return
    else:
        plugin.instance = plugin.factory
    _check_hooks(plugin)


def _check_hooks(plugin: Plugin) -> None:
    candidates = {
        name: getattr(plugin.instance, name) for name in dir(plugin.instance) if name.startswith("invarlock_")
    }
    marked = {name for name, value in candidates.items() if hook_marks(value) is not None}
    for name in sorted(candidates):
        if name in marked and name not in HOOKS:
            plugin.fail(f"unknown hook {name!r}{nearest(name, HOOKS)}")
        elif name not in marked and name in HOOKS and callable(candidates[name]):
            plugin.fail(f"{name} is not marked; put @invarlock.hookimpl above it")
        elif name in marked:
            _check_arguments(plugin, name, candidates[name])
    if not marked and plugin.status is Status.READY:
        plugin.fail(f"{plugin.module} implements no hook; known are {', '.join(HOOKS)}")
    plugin.hooks = tuple(sorted(marked & set(HOOKS)))


def _check_arguments(plugin: Plugin, hook: str, function: Any) -> None:
    given = inspect.signature(getattr(hookspecs, hook)).parameters
    for name, parameter in inspect.signature(function).parameters.items():
        if name not in given:
            hint = nearest(name, given) or f"; it has {', '.join(given)}"
            plugin.fail(f"{hook} has no argument {name!r}{hint}")
        elif parameter.default is not parameter.empty:
            plugin.fail(f"{hook}: the argument {name!r} has a default, so it would never be passed; remove the default")


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
