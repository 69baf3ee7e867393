"""Tokens with a meaning of their own: those that end an answer, and those that two vocabularies do not share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from invarlock.models.facts import text_config_of


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Ids at which servers stop: those of the generation configuration, else of the model's, and the tokenizer's.

    :param model: None, as the tokenizer may be, for those of the other alone.
    """
    configurations = (getattr(model, "generation_config", None), getattr(model, "config", None), text_config_of(model))
    stated = (getattr(each, "eos_token_id", None) for each in configurations)
    ids = next((given for given in stated if given is not None), None)
    listed = ids if isinstance(ids, list | tuple) else [ids]
    return frozenset(each for each in (*listed, getattr(tokenizer, "eos_token_id", None)) if isinstance(each, int))


@dataclass(frozen=True)
class ChangedVocabulary:
    """Entries of a vocabulary that are not what they were, in the order of their ids. New ones are no harm."""

    before: dict[str, int]
    after: dict[str, int]
    moved: list[str]
    """Entries that have another id."""
    lost: list[str]

    @classmethod
    def of(cls, one: Any, other: Any) -> ChangedVocabulary:
        """Changes from one tokenizer to another; of one that does not list its vocabulary, an empty one is compared."""
        before, after = (dict(getattr(tokenizer, "get_vocab", dict)()) for tokenizer in (one, other))
        changed = sorted(
            (token for token, place in before.items() if after.get(token) != place), key=before.__getitem__
        )
        moved, lost = ([token for token in changed if (token in after) == kept] for kept in (True, False))
        return cls(before, after, moved, lost)
