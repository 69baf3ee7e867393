"""Fields of a model's configuration, by what a change of each means to whoever loads the checkpoint."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from invarlock.api import POSITION_FIELDS

CHANGES_OUTPUTS = {
    **POSITION_FIELDS,
    r"^is_decoder$|is_causal": "chooses the tokens that each token attends to",
    r"decoder_start_token_id": "is what the decoder reads first",
    r"(image|video|audio|vision\w*|bo[ia]|eo[ia])_token_(id|index)$": "stands for an image, a film or a sound",
    r"softcap|logit_scale|logits_scal|final_logit": "bounds or scales the logits",
    r"hidden_act|activation_function|hidden_activation|ffn_act|dense_act|feed_forward_proj|is_gated": (
        "is the activation function"
    ),
    r"experts_per_tok|top_?k|topk|router|routed_scal|scoring_func|norm_topk|n_group|moe_|shared_expert": (
        "routes tokens to experts"
    ),
    r"eps$|epsilon$|norm": "normalizes hidden states",
    r"bias": "adds biases",
    r"multiplier|query_pre_attn|attention_scal|scale_attn|residual_scal|embedding_scal|scale_emb|mup": (
        "scales hidden states or attention"
    ),
    r"num_hidden_layers|n_layer|num_.*heads|n_head|head_dim|hidden_size|intermediate_size|n_embd": (
        "is a size of the model"
    ),
}
"""Expressions for the names of fields, each with the reason why its change is a change of the model."""
LOADERS_DISAGREE = {
    r"^architectures$": "names the class that is loaded",
    r"^model_type$": "names the class that is loaded",
    r"auto_map": "names code beside the weights",
}
REPRESENTATION = {
    r"dtype$": "is how numbers are stored; what that does to them is measured",
    r"quantization_config|compression_config": "is how numbers are packed; it is held against the files",
    r"^vocab_size$": "is the number of rows, which may be padded; lost ones are found by their shapes",
    r"^tie_word_embeddings$": "is how the head is stored; it is held against the files",
}
BOOKKEEPING = {
    r"version$|^name": "names and versions",
    r"^(bos|eos|pad|sep|cls|unk|mask)_token_id$": "is compared as a token, by what it does",
    r"use_cache|cache_implementation|return_dict|output_|^chunk_size": "is a setting of the call",
    r"drop|pdrop|initializer|aux_loss|z_loss|jitter|label_smoothing|gradient_checkpoint|loss_": "matters in training",
    r"id2label|label2id|problem_type|task_specific|^summary_|pretraining_tp|finetuning": "changes no output",
    r"attn_implementation|experts_implementation|torchscript|pruned_heads": "chooses an implementation",
}


@dataclass(frozen=True)
class Field:
    """A field of two configurations that differs."""

    name: str
    before: Any
    after: Any
    reason: str
    loaders_disagree: bool = False

    def __str__(self) -> str:
        return f"{self.name}, which {self.reason}: {self.before!r} became {self.after!r}"


def changed_fields(before: Mapping[str, Any], after: Mapping[str, Any], config: Any) -> list[Field]:
    """Fields whose change may be one of the model, those that are known to change outputs first.

    :param config: the edited model's, whose class tells which names its code reads.
    """
    before, after = _completed(before), _completed(after)
    found = [
        changed
        for name in sorted(before.keys() | after.keys())
        if not _alike(before.get(name), after.get(name))
        and (changed := _classified(name, before.get(name), after.get(name), config))
    ]
    return sorted(found, key=lambda field: field.loaders_disagree)


def _completed(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """Fields, and the number of heads and their size as models take them where they are not stated."""
    heads, size = fields.get("num_attention_heads"), fields.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(size, int) or not heads:
        return fields
    return {"num_key_value_heads": heads, "head_dim": size // heads, **fields}


def _classified(name: str, before: Any, after: Any, config: Any) -> Field | None:
    """A changed field with the reason why it counts; None for one that does not."""
    last = name.rpartition(".")[2]
    for harmless in (REPRESENTATION, BOOKKEEPING):
        if _reason(harmless, last):
            return None
    if reason := _reason(LOADERS_DISAGREE, last):
        # A file that does not say is read by its other fields.
        return None if before is None or after is None else Field(name, before, after, reason, loaders_disagree=True)
    # The whole name, for a section says what its fields are about: rope_parameters.factor.
    if reason := _reason(CHANGES_OUTPUTS, name):
        return None if _same_function(before, after) else Field(name, before, after, reason)
    if not hasattr(type(config), name.partition(".")[0]):
        # No code of this class reads it.
        return None
    return Field(name, before, after, "the model reads")


def _reason(table: Mapping[str, str], name: str) -> str | None:
    return next((reason for pattern, reason in table.items() if re.search(pattern, name)), None)


def _alike(one: Any, other: Any) -> bool:
    # A file may have held a number in single precision.
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _same_function(before: Any, after: Any) -> bool:
    """True of two names of one activation function, such as gelu_new and gelu_pytorch_tanh."""
    import torch
    from transformers.activations import ACT2FN

    if not (isinstance(before, str) and isinstance(after, str) and before in ACT2FN and after in ACT2FN):
        return False
    points = torch.linspace(-8, 8, 257)
    with torch.no_grad():
        return torch.allclose(ACT2FN[before](points), ACT2FN[after](points), atol=1e-6)
