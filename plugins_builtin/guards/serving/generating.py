"""Stop tokens, and the sampling defaults that a server takes from a checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from plugins_builtin.guards.serving.findings import Findings

DEFAULTS = {
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "max_length": 20,
    "min_length": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "token_healing": False,
}
"""Values that transformers takes for fields that are not set (its documentation of ``GenerationConfig``)."""
OF_BEAMS = ("num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping")
"""Fields that only the search with several beams reads."""
BOOKKEEPING = re.compile(
    r"^_|version$|^output_|^return_|cache|compile|^low_memory$|chunk_size|batching|assistant|lookbehind|^use_mtp$"
    r"|lookup|ngram_size$|^speculat|^(bos|eos|pad)_token_id$"
)
"""Fields that change no text: names, outputs of the call, speed; special tokens are compared by what they do."""


def settings_of(model: Any) -> dict[str, Any]:
    """The fields that are set in a model's generation configuration; none of a model without one."""
    to_dict = getattr(getattr(model, "generation_config", None), "to_dict", dict)
    # Transformers falls back to the configuration of the model for it.
    start = getattr(getattr(model, "config", None), "decoder_start_token_id", None)
    return {"decoder_start_token_id": start} | {name: value for name, value in to_dict().items() if value is not None}


def impossible_ids(model: Any) -> Iterator[str]:
    """Ids in the configurations that no token has: whoever pads, begins or ends with one fails."""
    from invarlock.api import input_embeddings

    rows = getattr(getattr(input_embeddings(model), "weight", None), "shape", (math.inf,))[0]
    for section in ("config", "generation_config"):
        for name, value in sorted(vars(getattr(model, section, object)).items()):
            listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
            if name.endswith("token_id") and any(not isinstance(each, int) or each >= rows for each in listed):
                yield f"{section}: {name} is {value!r}, which no token has: there are {rows}"


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


def compare_configured_stops(before: Any, after: Any, known: frozenset[int], tokenizer: Any, found: Findings) -> None:
    """Add stop tokens of the configuration alone, which some servers read beside the generation configuration's.

    :param known: tokens that the baseline stops at, wherever they are named.
    """
    added = _listed(after) - _listed(before) - known
    if added:
        names = _named(added, tokenizer)
        found.warn.append(f"stop tokens: eos_token_id of the configuration adds {names}, at which some servers stop")


def _listed(ids: Any) -> frozenset[int]:
    return frozenset(each for each in (ids if isinstance(ids, list | tuple) else [ids]) if isinstance(each, int))


def compare_sampling(before: Mapping[str, Any], after: Mapping[str, Any], found: Findings) -> None:
    """Add sampling defaults that differ in effect."""
    changed = [
        f"{name} {_shown(before.get(name))} became {_shown(after.get(name))}"
        for name in sorted(before.keys() | after.keys())
        if _changes_text(name, before, after) and _effective(name, before) != _effective(name, after)
    ]
    if changed:
        found.warn.append(f"generation defaults: {', '.join(changed)}")


def _named(ids: frozenset[int], tokenizer: Any) -> str:
    if not ids:
        return "none"
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    tokens = ((number, convert(number) if convert else None) for number in sorted(ids))
    return ", ".join(str(number) if token is None else repr(token) for number, token in tokens)


def _changes_text(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    from transformers import GenerationConfig

    if name in OF_BEAMS:
        return any(_effective("num_beams", side) != 1 for side in (before, after))
    return name in DEFAULTS or (hasattr(GenerationConfig(), name) and not BOOKKEEPING.search(name))


def _effective(name: str, settings: Mapping[str, Any]) -> Any:
    value = settings.get(name)
    return DEFAULTS.get(name) if value is None else value


def _shown(value: Any) -> str:
    return "unset" if value is None else repr(value)
