"""The edited checkpoint of a comparison: a model of its own, or an adapter that is merged into the baseline."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from invarlock.checkpoints.lora import LoraAdapter, is_adapter
from invarlock.core.errors import UsageError, named_by, one_line
from invarlock.core.results import Action, Finding
from invarlock.pipeline.session import BASELINE, SUBJECT, Session
from invarlock.pipeline.token_rows import EDIT
from invarlock.plugins.adapter import Adapter

log = logging.getLogger("invarlock")
TOKENIZER = "tokenizer_config.json"


def load(
    session: Session, model_id: str, *, on_disk: bool, key: str = BASELINE, simulated: bool = True
) -> tuple[torch.nn.Module, Adapter]:
    """Load a checkpoint, leaving its weights on disk if that is wanted and can be.

    :param simulated: let passes round activations as it declares; of weights on disk there are none.
    """
    if on_disk:
        try:
            return session.load(model_id, stream=True, key=key)
        except UsageError as error:
            log.info("%s; loading the whole model", one_line(error))
    model, adapter = session.load(model_id, key=key)
    if simulated and not on_disk:
        session.simulate(model, model_id, key)
    return model, adapter


@dataclass(frozen=True)
class Subject:
    """An edited checkpoint by its name, and how it is loaded."""

    session: Session
    name: str
    lora: LoraAdapter | None

    @classmethod
    def of(cls, session: Session, name: str) -> Subject:
        """:raises InputError: it is an adapter that cannot be merged."""
        with named_by(SUBJECT):
            return cls(session, name, LoraAdapter.read(Path(name)) if is_adapter(Path(name)) else None)

    def load(self, *, on_disk: bool) -> tuple[torch.nn.Module, Adapter]:
        """The edited model."""
        model, adapter = load(self.session, self.model_id, on_disk=on_disk, key=SUBJECT)
        if self.lora:
            with named_by(SUBJECT):
                self.lora.merge_into(model)
        return model, adapter

    @property
    def model_id(self) -> str:
        """The checkpoint that its configuration and most of its weights are in."""
        return self.session.config.model.id if self.lora else self.name

    @property
    def tokenizer_id(self) -> str:
        """The checkpoint that its tokenizer is in: an adapter need not have one of its own."""
        return self.name if (Path(self.name) / TOKENIZER).is_file() else self.model_id

    @property
    def plan(self) -> dict[str, str]:
        """As the report has it."""
        return {"subject": self.name} | ({"merged": self.lora.described} if self.lora else {})

    def findings(self) -> Iterator[Finding]:
        """A warning where an adapter was made for another model than the baseline."""
        named = self.lora.base if self.lora else None
        # A copy of a hub's model keeps the last part of its name.
        if named and Path(named).name != Path(self.model_id).resolve().name:
            message = f"the adapter names {named} as its base, and was merged into {self.model_id}"
            yield Finding(EDIT, Action.WARN, message)
