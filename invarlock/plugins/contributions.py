"""What plugins bring besides themselves: documents, and what goes by a name of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from invarlock.core.errors import PluginError
from invarlock.plugins.plugin import Kind, Plugin


@dataclass(frozen=True)
class Contribution:
    """A provider, an exporter, a report format or a command, and the plugin that it is from, by its label."""

    kind: Kind
    name: str
    plugin: str
    value: Any = None

    def of(self, plugin: Plugin) -> Plugin:
        """The row of it in a list of plugins."""
        return replace(plugin, name=self.name, kind=self.kind)


def add_contributions(found: dict[str, Contribution], kind: Kind, plugin: str, returned: Any) -> None:
    """Add what a plugin returned, each under its ``name``.

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
        found[name] = Contribution(kind, name, plugin, value)


def _name_of(value: Any, kind: Kind, plugin: str) -> str:
    name = getattr(value, "name", None)
    if not isinstance(name, str) or not name:
        raise PluginError(f"{plugin}: {type(value).__name__} is no {kind}: its name is {name!r}, not a text")
    return name


class Documents(Sequence[str]):
    """The documents of a provider; what goes wrong when one is read is the provider's failure."""

    def __init__(self, plugin: str, returned: Any, asking: Callable[[], AbstractContextManager[None]]) -> None:
        """:raises PluginError: it is not a sequence."""
        readable = all(hasattr(returned, name) for name in ("__len__", "__getitem__"))
        if not readable or isinstance(returned, str | bytes | Mapping):
            raise PluginError(f"{plugin}: returned {type(returned).__name__}, not a list of texts")
        self._plugin, self._texts, self._asking = plugin, returned, asking

    def __len__(self) -> int:
        with self._asking():
            return len(self._texts)

    def __getitem__(self, row: Any) -> Any:
        with self._asking():
            text = self._texts[row]
        if not isinstance(text, str):
            raise PluginError(f"{self._plugin}: document {row} is of type {type(text).__name__}, not a text")
        return text
