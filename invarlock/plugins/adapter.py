"""The adapter that loaded a model, whatever its form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from invarlock.core.errors import PluginError
from invarlock.core.plain import plain
from invarlock.plugins.classes import ModelAdapter
from invarlock.plugins.plugin import Plugin

Ask = Callable[..., Any]
"""Calls a hook on one adapter: a plugin, the hook's name, and its arguments by name."""


class DefaultAdapter(ModelAdapter):
    """Answers the hooks that an adapter in the form of a module leaves out."""

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> None:
        return None


class Adapter:
    """The adapter that loaded a model, as guards and the pipeline see it, whatever its form; each guard has a copy.

    Attributes beyond the methods of ``ModelAdapter`` are those of the plugin itself.
    """

    def __init__(self, plugin: Plugin, ask: Ask) -> None:
        self._plugin, self._ask = plugin, ask
        self.name = plugin.name

    def load_tokenizer(self, model_id: str, **options: Any) -> Any:
        return self._ask(self._plugin, "invarlock_load_tokenizer", model_id=model_id, options=options)

    def describe(self, model: Any) -> dict[str, Any]:
        description = self._ask(self._plugin, "invarlock_describe", model=model)
        if not isinstance(description, Mapping):
            raise PluginError(f"adapter {self.name}: describe returned {type(description).__name__}, not a dict")
        described: dict[str, Any] = plain(description)
        return described

    def snapshot(self, model: Any) -> Any:
        return self._ask(self._plugin, "invarlock_snapshot", model=model)

    def restore(self, model: Any, snapshot: Any) -> None:
        self._ask(self._plugin, "invarlock_restore", model=model, snapshot=snapshot)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._plugin.instance, name)
