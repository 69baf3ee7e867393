"""Stop tokens, and the sampling defaults that a server takes from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugins_builtin.guards.serving.findings import Findings

SAMPLING = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "max_new_tokens": None,
    "max_length": 20,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "bad_words_ids": None,
    "guidance_scale": None,
}
"""Fields of the generation configuration that change what is generated, with what transformers takes where one is not
set (its documentation of ``GenerationConfig``)."""


def settings_of(model: Any) -> dict[str, Any]:
    """A model's generation configuration; empty for a model without one."""
    to_dict = getattr(getattr(model, "generation_config", None), "to_dict", dict)
    return dict(to_dict())


def compare_stops(
    before: frozenset[int], after: frozenset[int], tokenizer: Any, found: Findings, *, converted: bool
) -> None:
    """Add stop tokens that are gone or new.

    :param converted: at least one side is a GGUF file, which has room for one of them.
    """
    if before == after or (converted and before & after):
        return
    names = [_named(side, tokenizer) for side in (before, after)]
    message = f"stop tokens: {names[0]} became {names[1]}"
    if before and not before & after:
        found.rollback.append(f"{message}: what the model ends with no longer ends its answers")
    else:
        found.warn.append(message)


def compare_sampling(before: Mapping[str, Any], after: Mapping[str, Any], found: Findings) -> None:
    """Add sampling defaults that differ in effect."""
    changed = [
        f"{name} {_shown(before.get(name))} became {_shown(after.get(name))}"
        for name, default in SAMPLING.items()
        if _or(before.get(name), default) != _or(after.get(name), default)
    ]
    if changed:
        found.warn.append(f"generation defaults: {', '.join(changed)}")


def _named(ids: frozenset[int], tokenizer: Any) -> str:
    if not ids:
        return "none"
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    return ", ".join(f"{convert(number)!r}" if convert else str(number) for number in sorted(ids))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)
