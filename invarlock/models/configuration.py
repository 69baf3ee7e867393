"""Fields of a model's configuration, and those among them that decide what positions mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

POSITION_FIELDS: Mapping[str, str] = {
    r"rope|rotary": "turns positions into angles",
    r"sliding_window|layer_types|max_window_layers|attention_chunk|attn_layer|local_attention|no_rope": (
        "chooses the tokens that each token attends to"
    ),
    r"max_position_embeddings|n_positions|max_seq": "is the longest text that servers accept",
}
"""Expressions for the names of fields that decide how far tokens see each other, each with what the field does."""
OF_DEFAULT_ROPE = ("rope_type", "rope_theta", "partial_rotary_factor")
"""Fields that the default kind of rope reads: it knows no factor and no original length."""

OF_LAYER_TYPES = ("max_window_layers", "sliding_window_pattern")
"""Fields that say no more than which type each layer has, where all types are listed beside them."""


def fields_of(config: Any) -> dict[str, Any]:
    """Plain data in a configuration, as its class understands it, by names with dots; without fields of no effect.

    :param config: transformers' own or an adapter's; None has no fields.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    return dict(_flat("", values))


def position_fields_of(config: Any) -> dict[str, Any]:
    """Fields that decide what positions mean: what a change of one does to outputs grows with the distance."""
    names = re.compile("|".join(POSITION_FIELDS))
    return {name: value for name, value in fields_of(config).items() if names.search(name)}


def _flat(prefix: str, values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if _has_no_effect(str(key), values):
            continue
        if isinstance(value, Mapping):
            yield from _flat(f"{name}.", value)
        elif isinstance(value, bool | int | float | str | list | tuple):
            yield name, value


def _has_no_effect(key: str, beside: Mapping[Any, Any]) -> bool:
    """:param beside: the fields that it is one of."""
    if key.startswith("_"):
        # The library's own.
        return True
    if key in OF_LAYER_TYPES and beside.get("layer_types"):
        return True
    if "rope_type" not in beside:
        return False
    # `type` is the old name of `rope_type`.
    return key == "type" or (beside["rope_type"] == "default" and key not in OF_DEFAULT_ROPE)
