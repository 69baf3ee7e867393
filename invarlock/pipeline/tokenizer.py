"""The baseline's tokenizer: makes the windows, is saved with the model, and has to stay what it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from invarlock.core.errors import PluginError, UsageError, one_line
from invarlock.models.state import ModelState, tokenizer_digest
from invarlock.plugins.adapter import Adapter

log = logging.getLogger("invarlock")


class LoadedTokenizer:
    """A tokenizer as its adapter loads it, again where a plugin has changed it.

    :param required: whether a model without one is an error.
    :param wanted: whether it is loaded at all.
    :raises UsageError: it is required, and cannot be loaded.
    """

    def __init__(
        self, adapter: Adapter, model_id: str, trust: Mapping[str, Any], *, required: bool, wanted: bool
    ) -> None:
        self._adapter, self._model_id, self._trust = adapter, model_id, trust
        self._required, self._wanted = required, wanted
        self.live: Any = self._load()
        """None where there is none."""
        self._digest = self._digest_now()
        self._methods = ModelState.of_methods("tokenizer", self.live)

    def undo(self) -> list[str]:
        """Load the tokenizer again if it was changed, and name it.

        :raises PluginError: it is not the same one again.
        """
        replaced = self._methods.undo()
        if self._digest_now() == self._digest:
            return replaced
        self.live = self._load()
        if self._digest_now() != self._digest:
            raise PluginError(f"adapter {self._adapter.name}: the tokenizer was changed, and loads as another one now")
        self._methods = ModelState.of_methods("tokenizer", self.live)
        return ["the tokenizer", *replaced]

    def _digest_now(self) -> str:
        return "" if self.live is None else tokenizer_digest(self.live)

    def _load(self) -> Any:
        return (
            load_tokenizer(self._adapter, self._model_id, self._trust, required=self._required)
            if self._wanted
            else None
        )


def load_tokenizer(adapter: Adapter, model_id: str, trust: Mapping[str, Any], *, required: bool) -> Any:
    """A checkpoint's tokenizer; None where there is none.

    :raises UsageError: it is required, and cannot be loaded.
    """
    try:
        tokenizer = adapter.load_tokenizer(model_id, **trust)
    except UsageError as error:
        if required:
            raise
        log.warning("%s; going on without it", one_line(error))
        return None
    if not callable(tokenizer) or not hasattr(tokenizer, "all_special_ids"):
        raise PluginError(
            f"adapter {adapter.name}: load_tokenizer returned {type(tokenizer).__name__}, not a tokenizer"
        )
    return tokenizer
