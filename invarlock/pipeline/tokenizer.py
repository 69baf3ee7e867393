"""The baseline's tokenizer: makes the windows, is saved with the model, and has to stay what it was."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from invarlock.core.errors import PluginError, UsageError, one_line
from invarlock.core.model_state import tokenizer_digest
from invarlock.plugins.manager import Adapter

log = logging.getLogger("invarlock")


class LoadedTokenizer:
    """A tokenizer as its adapter loads it, again where a plugin has changed it.

    :param required: whether a model without one is an error.
    :raises UsageError: it is required, and cannot be loaded.
    """

    def __init__(self, adapter: Adapter, model_id: str, trust: Mapping[str, Any], *, required: bool) -> None:
        self._adapter, self._model_id, self._trust, self._required = adapter, model_id, trust, required
        self.live: Any = self._load()
        """None where there is none."""
        self._digest = self._digest_now()

    def undo(self) -> list[str]:
        """Load the tokenizer again if it was changed, and name it.

        :raises PluginError: it is not the same one again.
        """
        if self._digest_now() == self._digest:
            return []
        self.live = self._load()
        if self._digest_now() != self._digest:
            raise PluginError(f"adapter {self._adapter.name}: the tokenizer was changed, and loads as another one now")
        return ["the tokenizer"]

    def _digest_now(self) -> str:
        return "" if self.live is None else tokenizer_digest(self.live)

    def _load(self) -> Any:
        try:
            tokenizer = self._adapter.load_tokenizer(self._model_id, **self._trust)
        except UsageError as error:
            if self._required:
                raise
            log.warning("%s; going on without it", one_line(error))
            return None
        if not callable(tokenizer):
            found = type(tokenizer).__name__
            raise PluginError(f"adapter {self._adapter.name}: load_tokenizer returned {found}, not a tokenizer")
        return tokenizer
