"""Catalog of plugins: entry points, modules named with ``-p``, and the one edit; each with its state."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from invarlock import __version__
from invarlock.core.errors import (
    EscapedError,
    InvarlockError,
    PluginError,
    UsageError,
    contained,
    located,
    nearest,
    one_line,
    unknown,
)
from invarlock.plugins.checking import check, hook_marks
from invarlock.plugins.classes import Guard, ModelAdapter
from invarlock.plugins.plugin import KINDS, OWN_DISTRIBUTION, Kind, Origin, Plugin, Status

log = logging.getLogger("invarlock")


@dataclass(frozen=True)
class Selection:
    """Choice of plugins on the command line, read before anything is imported."""

    modules: tuple[str, ...] = ()
    blocked: frozenset[str] = frozenset()
    autoload: bool = True

    @classmethod
    def of(cls, names: Iterable[str], *, autoload: bool) -> Selection:
        """Split ``-p`` values into those to load and, as ``no:NAME``, those to block."""
        names = tuple(names)
        blocked = frozenset(name.removeprefix("no:") for name in names if name.startswith("no:"))
        modules = dict.fromkeys(name for name in names if not name.startswith("no:"))
        for name in modules.keys() & blocked:
            log.warning("-p %s: is not loaded, -p no:%s blocks it", name, name)
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
        named = {plugin.name for plugin in installed if not plugin.is_own_hooks} & set(selection.modules)
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
        """Import a module that somebody named, and take what it holds as plugins.

        :raises UsageError: it does not import, holds no plugin, or one whose name is taken.
        :raises PluginError: it would have ended the process.
        """
        try:
            with contained():
                module = _import_local(name, [plugin.name for plugin in installed])
                added = list(_local_plugins(name, module))
        except UsageError:
            raise
        except Exception as error:
            failure: type[InvarlockError] = PluginError if isinstance(error, EscapedError) else UsageError
            raise failure(f"-p {name}: does not import: {located(error)}") from error
        if not added:
            raise UsageError(
                f"-p {name}: {_origin_of(module)} has no hook implementations and no classes derived from Guard or "
                "ModelAdapter"
            )
        for plugin in added:
            if taken := self.named(plugin.name, plugin.kind):
                raise UsageError(
                    f"-p {name}: the name of its {plugin.label} is taken, {taken[0].whose}; give yours another name"
                )
            self.add(plugin)
        return added

    def add(self, plugin: Plugin) -> None:
        """Take in a plugin that is there already, as ``factory``.

        :raises UsageError: it cannot be used.
        """
        check(plugin)
        plugin.require_ready()
        self.plugins.append(plugin)

    def named(self, name: str, *kinds: Kind) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.name == name and (not kinds or plugin.kind in kinds)]

    @property
    def has_strangers(self) -> bool:
        """True if any plugin that was imported is not built in, even if it failed."""
        return any(
            plugin.origin is not Origin.BUILTIN and plugin.status is not Status.BLOCKED for plugin in self.plugins
        )

    def of_kind(self, *kinds: Kind) -> list[Plugin]:
        return [plugin for plugin in self.plugins if plugin.kind in kinds]

    def find(self, name: str, kind: Kind, where: str) -> Plugin:
        """The plugin of a name and kind, ready or not.

        :raises UsageError: when there is none, with the nearest name.
        """
        for plugin in self.named(name, kind):
            return plugin
        known = sorted(plugin.name for plugin in self.of_kind(kind))
        raise UsageError(f"{where}: {unknown(kind, name, known)}")

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
    for entry in importlib.metadata.entry_points(group=_AnyGroup()):
        distribution, version = _identity(entry.dist)
        key = (entry.group, entry.name, f"{distribution} {entry.value}")
        if key in seen:  # An editable install beside a built one lists the same entry point twice.
            continue
        seen.add(key)
        origin = Origin.BUILTIN if distribution == OWN_DISTRIBUTION else Origin.PLUGIN
        plugin = Plugin(entry.name, KINDS[entry.group], origin, entry.value, "", distribution, version)
        plugin.entry_point = f"{entry.group}: {entry.name} = {entry.value}"
        if entry.pattern.match(entry.value):
            plugin.module, plugin.attribute = entry.module, entry.attr or ""
        else:
            plugin.fail(f"its entry point {entry.value!r} names no module")
        plugins.append(plugin)
    order = [Origin.BUILTIN, Origin.PLUGIN]
    yield from sorted(plugins, key=lambda p: (order.index(p.origin), p.kind, p.name, p.distribution or ""))


class _AnyGroup(str):
    """Equal to the name of each group: a scan for one of them reads every distribution, and one scan finds all."""

    def __eq__(self, group: object) -> bool:
        return group in KINDS

    __hash__ = str.__hash__


@cache
def _identity(distribution: importlib.metadata.Distribution | None) -> tuple[str | None, str | None]:
    """Name and version; kept, for each is read from all of the metadata, and a distribution can have many plugins."""
    return (distribution.name, distribution.version) if distribution else (None, None)


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
            raise UsageError(f"-p no:{name}: unknown plugin {name!r}{hint}")
    for plugin in plugins:
        if plugin.name in selection.blocked:
            plugin.fail(f"blocked by -p no:{plugin.name}", Status.BLOCKED)


def _load(plugin: Plugin) -> None:
    """Import an installed plugin; whatever goes wrong becomes its state, and hurts nobody else."""
    try:
        with contained():
            plugin.factory = importlib.import_module(plugin.module)
            for part in filter(None, plugin.attribute.split(".")):
                plugin.factory = getattr(plugin.factory, part)
    except Exception as error:
        plugin.fail_of(error, one_line(error))
    else:
        check(plugin)


def _import_local(name: str, known: Iterable[str]) -> ModuleType:
    """Import a module that somebody named; UsageError if it is not there, or another one than the working folder's."""
    if not re.fullmatch(r"\w+(\.\w+)*", name) or name.endswith(".py"):
        stem = Path(name.removesuffix(".py")).name
        raise UsageError(f"-p {name}: takes the name of a module, not a path; from its folder: -p {stem}")
    # Last on the path: a file of the working folder must not take the place of an installed module.
    if "" not in sys.path:
        sys.path.append("")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise UsageError(f"-p {name}: unknown plugin or module{nearest(name, known)}") from None
        raise
    if (shadowed := _shadowed(name, module)) is not None:
        raise UsageError(f"-p {name}: {_origin_of(module)} has the name of {shadowed}; rename that file")
    return module


def _shadowed(name: str, module: ModuleType) -> Path | None:
    """The file of the working folder that somebody meant, and another module came in its place."""
    stem = Path(*name.split("."))
    found = getattr(module, "__file__", None)
    meant = next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)
    return meant if meant and (found is None or not Path(found).exists() or not meant.samefile(found)) else None


def _origin_of(module: ModuleType) -> str:
    if module.__name__.partition(".")[0] in sys.stdlib_module_names:
        return f"the module {module.__name__} of Python itself"
    return f"the module {module.__name__} ({getattr(module, '__file__', None) or 'a namespace'})"


def _local_plugins(name: str, module: ModuleType) -> Iterator[Plugin]:
    """The classes that a module defines, each under its own name, and the module itself if it implements hooks."""
    for attribute, value in vars(module).items():
        if inspect.isclass(value) and value.__module__ == module.__name__ and issubclass(value, Guard | ModelAdapter):
            kind = Kind.GUARD if issubclass(value, Guard) else Kind.ADAPTER
            if not isinstance(value.name, str):
                raise TypeError(f"{attribute}.name is of type {type(value.name).__name__}, not a text")
            yield Plugin(value.name or attribute, kind, Origin.LOCAL, name, attribute, factory=value)
    if any(attribute.startswith("invarlock_") for attribute in vars(module)):
        plugin = Plugin(name, Kind.HOOKS, Origin.LOCAL, name, factory=module)
        if any(_is_plain_hook(module, hook) for hook in ("invarlock_prepare", "invarlock_validate")):
            plugin.kind = Kind.GUARD
        elif _is_plain_hook(module, "invarlock_load_model"):
            plugin.kind = Kind.ADAPTER
        yield plugin


def _is_plain_hook(owner: Any, name: str) -> bool:
    marks = hook_marks(getattr(owner, name, None))
    return bool(marks) and not (marks.get("wrapper") or marks.get("hookwrapper"))
