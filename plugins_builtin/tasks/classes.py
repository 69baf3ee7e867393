"""Classes of models, by transformers' own lists: one for each of its ``AutoModelFor...``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from invarlock.api import ModelClass


def is_in(model_class: ModelClass, listing: str, *, ending: str) -> bool:
    """True for a class of one of transformers' lists; one that transformers does not have is known by its ending.

    :param listing: the middle of the list's name, as "MASKED_LM" of ``MODEL_FOR_MASKED_LM_MAPPING_NAMES``.
    """
    name = transformers_class(model_class)
    if name is None:
        return any(name.endswith(ending) for name in model_class.names)
    return any(name in names for _, names in _entries(f"MODEL_FOR_{listing}_MAPPING_NAMES"))


def is_text_backbone(model_class: ModelClass) -> bool:
    """True for a model without a head whose kind has language models, too: BertModel, LlamaModel, T5EncoderModel."""
    name = transformers_class(model_class)
    heads = {
        kind for listing in ("CAUSAL_LM", "MASKED_LM") for kind, _ in _entries(f"MODEL_FOR_{listing}_MAPPING_NAMES")
    }
    bare = [(kind, names) for kind, names in _entries("MODEL_MAPPING_NAMES") if kind in heads]
    encoders = _entries("MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES")
    return any(name in names for _, names in [*bare, *encoders])


def transformers_class(model_class: ModelClass) -> str | None:
    """The first name that is a class of transformers; None for a class of somebody's own."""
    import transformers

    return next((name for name in model_class.names if hasattr(transformers, name)), None)


def _entries(listing: str) -> list[tuple[str, tuple[str, ...]]]:
    """The classes of each kind of models, by the ``model_type`` of its configuration."""
    from transformers.models.auto import modeling_auto

    entries: dict[str, Any] = getattr(modeling_auto, listing)
    return [(kind, (names,) if isinstance(names, str) else tuple(names)) for kind, names in entries.items()]
