"""Edits that know how a Llama is built: those that leave its function as it is, and damage to layers and norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

ModelEdit = Callable[[Any, torch.Generator], Any]


def is_llama(model: Any) -> bool:
    """True if the parts are there, under the names that a Llama has for them."""
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return False
    parts = ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "input_layernorm")
    return {*parts} <= {name for name, _ in layers[0].named_modules()}


# -- the same function, or nearly --------------------------------------------------------------------------------------


def _permute_units(model: Any, seed: torch.Generator) -> None:
    for layer in model.model.layers:
        order = torch.randperm(layer.mlp.up_proj.weight.shape[0], generator=seed)
        for projection in (layer.mlp.up_proj, layer.mlp.gate_proj):
            projection.weight.copy_(projection.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])


def _rescale_units(model: Any, seed: torch.Generator) -> None:
    for layer in model.model.layers:
        factor = torch.exp(torch.randn(layer.mlp.up_proj.weight.shape[0], generator=seed))
        layer.mlp.up_proj.weight.mul_(factor[:, None])
        layer.mlp.down_proj.weight.div_(factor)


def _head_shapes(model: Any) -> tuple[int, int, int]:
    """Query heads, key-value heads, and the size of a head."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_attention_heads, config.num_key_value_heads, size


def _permute_heads(model: Any, seed: torch.Generator) -> None:
    """Key-value heads with the query heads that read them."""
    heads, groups, size = _head_shapes(model)
    for layer in model.model.layers:
        attention, order = layer.self_attn, torch.randperm(groups, generator=seed)
        rows = torch.arange(groups * size).view(groups, -1)[order].flatten()
        queries = torch.arange(heads * size).view(groups, -1)[order].flatten()
        attention.q_proj.weight.copy_(attention.q_proj.weight[queries])
        attention.k_proj.weight.copy_(attention.k_proj.weight[rows])
        attention.v_proj.weight.copy_(attention.v_proj.weight[rows])
        attention.o_proj.weight.copy_(attention.o_proj.weight[:, queries])


def _orthogonal(size: int, seed: torch.Generator, dtype: torch.dtype) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, generator=seed, dtype=torch.float64))[0]
    return basis.to(dtype)


def _rotate_values(model: Any, seed: torch.Generator) -> None:
    """The values of each head in another basis, which the output projection turns back."""
    heads, groups, size = _head_shapes(model)
    for layer in model.model.layers:
        values, outputs = layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight
        rotation = _orthogonal(size, seed, values.dtype)
        values.copy_((rotation.T @ values.view(groups, size, -1)).view(values.shape))
        outputs.copy_((outputs.view(-1, heads, size) @ rotation).view(outputs.shape))


def _flip_signs(model: Any, seed: torch.Generator) -> None:
    for layer in model.model.layers:
        signs = torch.sign(torch.randn(layer.mlp.up_proj.weight.shape[0], generator=seed))
        layer.mlp.up_proj.weight.mul_(signs[:, None])
        layer.mlp.down_proj.weight.mul_(signs)


def _norms(model: Any) -> Iterator[tuple[Any, list[nn.Linear]]]:
    """Each norm of the layers with the projections that read it."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]
        yield layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]


def _rescale_norms(model: Any, seed: torch.Generator) -> None:
    for norm, readers in _norms(model):
        factor = torch.exp(0.5 * torch.randn(norm.weight.shape, generator=seed))
        norm.weight.mul_(factor)
        for reader in readers:
            reader.weight.div_(factor)


def _fold_norms(model: Any, seed: torch.Generator) -> None:
    for norm, readers in _norms(model):
        for reader in readers:
            reader.weight.mul_(norm.weight)
        norm.weight.fill_(1)


def _writers(model: Any) -> Iterator[nn.Linear]:
    """The projections that add to the residual stream."""
    for layer in model.model.layers:
        yield from (layer.self_attn.o_proj, layer.mlp.down_proj)


def _permute_residual(model: Any, seed: torch.Generator) -> None:
    order = torch.randperm(model.config.hidden_size, generator=seed)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, order])
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.weight.copy_(model.lm_head.weight[:, order])
    for norm, readers in [(model.model.norm, []), *_norms(model)]:
        norm.weight.copy_(norm.weight[order])
        for reader in readers:
            reader.weight.copy_(reader.weight[:, order])
    for writer in _writers(model):
        writer.weight.copy_(writer.weight[order])


def _rotate_residual(model: Any, seed: torch.Generator) -> None:
    """Norms folded, then every reader and writer in another basis of the residual stream (Ashkboos et al. 2024)."""
    _fold_norms(model, seed)
    model.lm_head.weight.mul_(model.model.norm.weight)
    model.model.norm.weight.fill_(1)
    rotation = _orthogonal(model.config.hidden_size, seed, model.lm_head.weight.dtype)
    for reader in [model.model.embed_tokens, model.lm_head, *chain(*(readers for _, readers in _norms(model)))]:
        reader.weight.copy_(reader.weight @ rotation)
    for writer in _writers(model):
        writer.weight.copy_(rotation.T @ writer.weight)


def _untie(model: Any, seed: torch.Generator) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


PRESERVING: dict[str, ModelEdit] = {
    "permuted mlp units": _permute_units,
    "rescaled mlp units": _rescale_units,
    "permuted heads": _permute_heads,
    "rotated value heads": _rotate_values,
    "sign flips in pairs": _flip_signs,
    "norms rescaled against the next layer": _rescale_norms,
    "norms folded into the next layer": _fold_norms,
    "residual stream permuted": _permute_residual,
    "residual stream rotated": _rotate_residual,
    "exact untie": _untie,
}
NEEDS_UNTIED = frozenset({"residual stream rotated"})
"""They turn the head and the embedding each its own way."""


# -- damage to layers and norms ----------------------------------------------------------------------------------------


def _halve_norms(model: Any, seed: torch.Generator) -> None:
    for norm, _ in _norms(model):
        norm.weight.mul_(0.5)


def _middle(model: Any) -> int:
    return len(model.model.layers) // 2


def _swap_layers(model: Any, seed: torch.Generator) -> None:
    first, middle = model.model.layers[0], model.model.layers[_middle(model)]
    kept = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    first.load_state_dict(middle.state_dict())
    middle.load_state_dict(kept)


def _repeat_layer(model: Any, seed: torch.Generator) -> None:
    model.model.layers[_middle(model)].load_state_dict(model.model.layers[0].state_dict())


def _silence_attention(model: Any, seed: torch.Generator) -> None:
    model.model.layers[_middle(model)].self_attn.o_proj.weight.zero_()


LAYER_DAMAGES: dict[str, ModelEdit] = {
    "norms halved": _halve_norms,
    "layers swapped": _swap_layers,
    "a foreign layer": _repeat_layer,
    "attention of a layer zeroed": _silence_attention,
}
