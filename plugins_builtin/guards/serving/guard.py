"""Guard of what servers read besides weights: configuration, tokenizer, chat template, generation defaults, files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from invarlock.api import Guard
from plugins_builtin.guards.figures import TOP, first_few
from plugins_builtin.guards.serving.configuration import Field, changed_fields
from plugins_builtin.guards.serving.files import new_problems, problems_of, unread
from plugins_builtin.guards.serving.findings import Findings
from plugins_builtin.guards.serving.generating import (
    compare_configured_stops,
    compare_sampling,
    compare_stops,
    impossible_ids,
    settings_of,
)
from plugins_builtin.guards.serving.tokens import around_special, compare_files, compare_longest, compare_tokens


@dataclass(frozen=True)
class _Side:
    """One of the two checkpoints, without its weights."""

    fields: Mapping[str, Any]
    settings: Mapping[str, Any]
    stops: frozenset[int]
    """Without the tokenizer's."""
    problems: list[str]
    unread: frozenset[str]
    """Stored tensors that have no place in the model."""
    place: str | None
    """The folder or file that it was loaded from."""

    @classmethod
    def of(cls, model: Any, place: str | None) -> _Side:
        from invarlock.api import fields_of, stop_tokens, unread_tensors_of

        is_gguf = _is_gguf(place)
        fields, problems = fields_of(getattr(model, "config", None)), problems_of(model, None if is_gguf else place)
        problems += impossible_ids(model)
        # A GGUF file holds tensors for its own readers, too.
        left = frozenset() if is_gguf else unread_tensors_of(model)
        return cls(fields, settings_of(model), stop_tokens(model, None), problems, left, place)


class ServingGuard(Guard):
    """Compares, by effect and without running the model, what servers read of both checkpoints.

    - Rollback: no stop token of the baseline's is left; the flag for tied weights contradicts the stored head; where
      outputs do not tell, tokens that have other ids, and fields of the configuration that change outputs.
    - Warn: stop tokens that come or go; generation defaults, roles of special tokens, rendered conversations, ids of a
      probe text or their decoding that differ; fields of the configuration that change outputs or that loaders read
      differently; what ``quantization_config`` declares and the files do not hold; two sets of weights; stored tensors
      that have no place in the model.

    Differences in representation (data type, packing, shards, a GGUF file's type) and bookkeeping (names, versions)
    are none.
    """

    name = "serving"

    def __init__(self) -> None:
        self._baseline: _Side | None = None

    def prepare(self, model: Any, adapter: Any, calib: Any, policy: Mapping[str, Any]) -> dict[str, Any]:
        self._baseline = _Side.of(model, _place(model))
        return {"ready": True, "problems_in_baseline": self._baseline.problems}

    def validate(self, model: Any, adapter: Any, context: Mapping[str, Any]) -> dict[str, Any]:
        from invarlock.api import context_of, stop_tokens

        if self._baseline is None:
            return {"passed": False, "action": "abort", "message": "not measured: prepare was not called"}
        before, after = self._baseline, _Side.of(model, context["edit"]["plan"].get("subject") or _place(model))
        converted = _is_gguf(before.place) or _is_gguf(after.place)
        found = Findings()
        fields = changed_fields(before.fields, after.fields, getattr(model, "config", None))
        # What outputs tell of a field is better than what its name does.
        decides = found.warn if context.get("edited") else found.rollback
        for field in fields:
            (found.warn if field.loaders_disagree else decides).append(f"configuration: {field}")
        for problem in new_problems(before.problems, after.problems):
            (found.rollback if problem.startswith("tie_word_embeddings") else found.warn).append(problem)
        found.warn += unread(before.unread, after.unread)
        tokenizers = context.get("tokenizers") or {}
        one, other = tokenizers.get("baseline"), tokenizers.get("edited")
        stops = before.stops | stop_tokens(None, one), after.stops | stop_tokens(None, other)
        compare_stops(*stops, one, found, converted=converted)
        if not converted:
            configured = before.fields.get("eos_token_id"), after.fields.get("eos_token_id")
            compare_configured_stops(*configured, stops[0] | stops[1], one, found)
            compare_sampling(before.settings, after.settings, found)
        if one is None or other is None:
            found.not_compared.append("the tokenizers: there are not two of them")
        elif one is not other:
            # Of ids that differ outputs tell, if each side read the text with its own.
            own = bool(context.get("edited")) and context["edited"].get("unit") == "byte"
            compare_tokens(one, other, found, converted=converted, measured=own)
            compare_longest(one, other, context_of(model), found)
            if before.place and after.place and not any(each.startswith("tokenizer:") for each in found.all):
                compare_files(Path(before.place), Path(after.place), around_special(one), found)
        return _result(found, fields)


def _result(found: Findings, fields: list[Field]) -> dict[str, Any]:
    return {
        "passed": not found.rollback,
        "action": found.action,
        "message": first_few(found.all) or "nothing that a server reads besides weights has changed",
        "warnings": found.warn,
        "metrics": {
            "rollback": found.rollback,
            "warn": found.warn,
            "not_compared": found.not_compared,
            # Not modules: what stands first among the causes of changed outputs.
            "causes": [{"cause": field.name, "evidence": str(field)} for field in fields[:TOP]],
        },
    }


def _is_gguf(place: str | None) -> bool:
    return place is not None and place.endswith(".gguf")


def _place(model: Any) -> str | None:
    """The folder or file that transformers says it loaded the model from."""
    place = getattr(model, "name_or_path", None)
    return place if isinstance(place, str) and place else None
