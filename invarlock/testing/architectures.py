"""Tiny real models of the architectures that InvarLock is tested with: random but seeded weights, in eval mode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

from invarlock.core.errors import UsageError, unknown

VOCABULARY = 96

SIZE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
UNTIED = SIZE | {"num_key_value_heads": 2, "tie_word_embeddings": False}
EXPERTS = UNTIED | {"intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """Untied."""
    return _build(transformers.LlamaForCausalLM, UNTIED | {"intermediate_size": 48} | changes)


def llama_tied(**changes: Any) -> transformers.LlamaForCausalLM:
    """With the output head tied to the embedding."""
    return llama(**{"tie_word_embeddings": True} | changes)


def gpt2(**changes: Any) -> transformers.GPT2LMHeadModel:
    """Tied, with Conv1D (in, out) instead of Linear."""
    size = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return _build(transformers.GPT2LMHeadModel, size | {"bos_token_id": 0, "eos_token_id": 0} | changes)


def bert(**changes: Any) -> transformers.BertForMaskedLM:
    """Tied, masked language model."""
    return _build(transformers.BertForMaskedLM, SIZE | {"intermediate_size": 48} | changes)


def t5(**changes: Any) -> transformers.T5ForConditionalGeneration:
    """Encoder and decoder, one embedding shared by both and by the output head, whatever the config says."""
    size = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return _build(transformers.T5ForConditionalGeneration, size | {"decoder_start_token_id": 0} | changes)


def mixtral(**changes: Any) -> transformers.MixtralForCausalLM:
    """Fused experts (expert, out, in) and a router."""
    return _build(transformers.MixtralForCausalLM, EXPERTS | changes)


def gpt_oss(**changes: Any) -> transformers.GptOssForCausalLM:
    """Fused experts (expert, in, out), with biases, and a router."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    special = {"head_dim": 8, "pad_token_id": 0, "eos_token_id": 0, "rope_parameters": rope}
    return _build(transformers.GptOssForCausalLM, EXPERTS | special | changes)


def opt(**changes: Any) -> transformers.OPTForCausalLM:
    """Tied, with fc1 and fc2 right in the block."""
    return _build(transformers.OPTForCausalLM, SIZE | {"ffn_dim": 48, "word_embed_proj_dim": 32} | changes)


ARCHITECTURES: dict[str, Callable[..., Any]] = {
    build.__name__: build for build in (llama, llama_tied, gpt2, bert, t5, mixtral, gpt_oss, opt)
}


def tiny_model(architecture: str = "llama", **changes: Any) -> Any:
    """A small real model with random but seeded weights, float32, in evaluation mode; nothing is downloaded.

    :param architecture: one of ``ARCHITECTURES``.
    :param changes: fields of its configuration, as in ``tiny_model("llama", num_hidden_layers=4)``.
    :raises UsageError: there is no such architecture.
    """
    if architecture not in ARCHITECTURES:
        raise UsageError(f"tiny_model: {unknown('architecture', architecture, ARCHITECTURES)}")
    return ARCHITECTURES[architecture](**changes)


def _build(model_class: Any, config: Mapping[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**config)).eval()
        # Transformers starts some of them, such as routers, as zeros; random ones show more.
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    return model
