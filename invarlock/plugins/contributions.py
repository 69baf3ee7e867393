"""Contributions of plugins: documents, and objects that go by a name of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from invarlock.core.errors import PluginError
from invarlock.core.records import Record
from invarlock.plugins.plugin import Kind, Plugin


@dataclass(frozen=True)
class Contribution:
    """A provider, a task, an exporter, a report format or a command, and the plugin that it is from, by its label."""

    kind: Kind
    name: str
    plugin: str
    value: Any = None

    def of(self, plugin: Plugin) -> Plugin:
        """The row of it in a list of plugins."""
        return replace(plugin, name=self.name, kind=self.kind)


Asking = Callable[[], AbstractContextManager[None]]
"""Makes of whatever is raised while a plugin is asked that plugin's failure."""


def add_contributions(
    found: dict[str, Contribution], kind: Kind, plugin: str, returned: Any, asking: Asking | None = None
) -> None:
    """Add what a plugin returned, each under its ``name``.

    :param asking: None for what is built in.
    :raises PluginError: it is not a list of objects with a name, or a name is taken.
    """
    if not isinstance(returned, list | tuple):
        raise PluginError(f"{plugin}: returned {type(returned).__name__}, not a list of {kind}s")
    for value in returned:
        name = _name_of(value, kind, plugin)
        if name in found:
            raise PluginError(
                f"{plugin}: the {kind} {name!r} is taken, by {found[name].plugin}; give yours another name"
            )
        found[name] = Contribution(kind, name, plugin, value if asking is None else Contained(value, asking))


class Contained:
    """An object that a plugin brought; whatever its attributes and methods raise is the plugin's failure."""

    def __init__(self, value: Any, asking: Asking) -> None:
        self._value, self._asking = value, asking

    def __getattr__(self, name: str) -> Any:
        with self._asking():
            found = getattr(self._value, name, self)
        if found is self:
            raise AttributeError(f"{type(self._value).__name__} lacks {name}")
        return partial(self._call, found) if callable(found) else found

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._asking():
            return method(*args, **kwargs)


def _name_of(value: Any, kind: Kind, plugin: str) -> str:
    name = getattr(value, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginError(f"{plugin}: {type(value).__name__} is no {kind}: its name is {name!r}, not a text")
    return name


class Documents(Sequence[Any]):
    """The documents of a provider; what goes wrong when one is read is the provider's failure."""

    def __init__(self, plugin: str, returned: Any, asking: Asking) -> None:
        """:raises PluginError: it is not a sequence."""
        readable = all(hasattr(returned, name) for name in ("__len__", "__getitem__"))
        if not readable or isinstance(returned, str | bytes | Mapping):
            raise PluginError(f"{plugin}: returned {type(returned).__name__}, not a list of texts or records")
        self._plugin, self._documents, self._asking = plugin, returned, asking

    def __len__(self) -> int:
        with self._asking():
            return len(self._documents)

    def __getitem__(self, row: Any) -> Any:
        with self._asking():
            document = self._documents[row]
        if not isinstance(document, str | Record):
            found = type(document).__name__
            raise PluginError(f"{self._plugin}: document {row} is of type {found}, not a text or record")
        return document
