"""Named, seeded edits of a Llama-style model, in place: what a guard must leave alone, and what it must catch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.quantization import Plan, Scheme, find_weights, quantize_model


@dataclass(frozen=True)
class Edit:
    """One edit; what it is, is measured, not claimed."""

    name: str
    apply: Callable[[Any, torch.Generator], None]
    module: str | None = None
    """The module that was damaged, where it is one."""
    untied: bool = False
    """Whether it needs a baseline whose output head is not tied to the embedding."""

    def __call__(self, model: nn.Module) -> None:
        """Apply it; the seed is the name's."""
        with torch.no_grad():
            self.apply(model, torch.Generator().manual_seed(zlib.crc32(self.name.encode())))


def edits(model: Any) -> Iterator[Edit]:
    """All edits for a model, by name; layers are chosen relative to its depth."""
    depth = len(model.model.layers)
    early, middle, late = 0, depth // 2, depth - 1
    yield Edit("identity", lambda model, seed: None)
    yield from _precision()
    yield from _preserving()
    yield from _whole_model()
    for layer in dict.fromkeys((early, middle, late)):
        yield from _one_matrix(layer)
    yield from _layers(middle)
    yield from _embeddings()


# -- the same function, or nearly --------------------------------------------------------------------------------------


def _precision() -> Iterator[Edit]:
    yield _rtn("int8 channel", Scheme(8))
    yield _rtn("int8 group 32", Scheme(8, group_size=32))
    yield _rtn("int8 asymmetric", Scheme(8, symmetric=False))
    yield _rtn("int8 clamped 0.001", Scheme(8, clamp_ratio=0.001))
    yield _rtn("int6 channel", Scheme(6))
    yield _rtn("int4 group 32", Scheme(4, group_size=32))
    yield _rtn("int4 channel", Scheme(4))
    for dtype in (torch.bfloat16, torch.float16):
        yield Edit(f"round trip {dtype}".replace("torch.", ""), _round_trip(dtype))
    for size in (1e-4, 1e-3):
        yield Edit(f"noise {size:g}", _noise(size))


def _preserving() -> Iterator[Edit]:
    yield Edit("permuted mlp units", _permute_units)
    yield Edit("rescaled mlp units", _rescale_units)
    yield Edit("permuted heads", _permute_heads)
    yield Edit("rotated value heads", _rotate_values)
    yield Edit("sign flips in pairs", _flip_signs)
    yield Edit("norms rescaled against the next layer", _rescale_norms)
    yield Edit("norms folded into the next layer", _fold_norms)
    yield Edit("residual stream permuted", _permute_residual)
    yield Edit("residual stream rotated", _rotate_residual, untied=True)
    yield Edit("exact untie", _untie)


# -- damage to the whole model -----------------------------------------------------------------------------------------


def _whole_model() -> Iterator[Edit]:
    yield _rtn("int3 channel", Scheme(3))
    yield _rtn("int2 channel", Scheme(2))
    yield _rtn("int2 group 32", Scheme(2, group_size=32))
    yield _rtn("int4 tensor", Scheme(4, per_channel=False))
    yield _rtn("int3 tensor", Scheme(3, per_channel=False))
    for size in (0.1, 0.2, 0.5):
        yield Edit(f"noise {size:g}", _noise(size))
    for share in (0.3, 0.5, 0.7):
        yield Edit(f"pruned {share:.0%}", _prune(share))
    yield Edit("scales along the wrong axis", _wrong_axis)
    yield Edit("stale scales", _stale_scales)
    yield Edit("all projections scaled by 1.2", lambda model, seed: _each(model, lambda weight: weight.mul_(1.2)))
    yield Edit("norms halved", lambda model, seed: [norm.weight.mul_(0.5) for norm in _norms(model)])


def _one_matrix(layer: int) -> Iterator[Edit]:
    for part in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        module = f"model.layers.{layer}.{part}"
        for name, damage in _DAMAGES.items():
            yield Edit(f"{part} of layer {layer} {name}", _on(module, damage), module)


def _on(module: str, damage: Callable[[Tensor, torch.Generator], None]) -> Callable[[Any, torch.Generator], None]:
    return lambda model, seed: damage(model.get_submodule(module).weight, seed)


def _shuffle(weight: Tensor, seed: torch.Generator) -> None:
    weight.copy_(weight[torch.randperm(len(weight), generator=seed)])


def _transpose(weight: Tensor, seed: torch.Generator) -> None:
    """The numbers in the other order, as a loader with the wrong layout reads them."""
    weight.copy_(weight.T.clone().reshape(weight.shape))


def _truncate(weight: Tensor, seed: torch.Generator) -> None:
    weight[len(weight) // 2 :] = 0


def _outliers(weight: Tensor, seed: torch.Generator) -> None:
    places = torch.randint(weight.numel(), (max(8, weight.numel() // 2000),), generator=seed)
    weight.view(-1)[places] = 40 * weight.abs().mean() * torch.sign(torch.randn(len(places), generator=seed))


def _flip_bits(weight: Tensor, seed: torch.Generator) -> None:
    """The highest bit of the exponent, in 1 of 20,000 weights: 0.01 becomes 1e36."""
    places = torch.randint(weight.numel(), (max(2, weight.numel() // 20_000),), generator=seed)
    weight.view(torch.int32).view(-1)[places] ^= 1 << 30


_DAMAGES: dict[str, Callable[[Tensor, torch.Generator], Any]] = {
    "zeroed": lambda weight, seed: weight.zero_(),
    "negated": lambda weight, seed: weight.neg_(),
    "scaled by 4": lambda weight, seed: weight.mul_(4),
    "shuffled": _shuffle,
    "transposed": _transpose,
    "truncated": _truncate,
    "with outliers": _outliers,
    "with bit flips": _flip_bits,
    "overflown": lambda weight, seed: weight[3].fill_(float("inf")),
    "with one NaN": lambda weight, seed: weight[0, 0].fill_(float("nan")),
    "replaced by noise": lambda weight, seed: weight.copy_(torch.randn(weight.shape, generator=seed) * weight.std()),
}


def _layers(layer: int) -> Iterator[Edit]:
    yield Edit("layers swapped", lambda model, seed: _swap(model, 0, layer))
    yield Edit("a foreign layer", lambda model, seed: _copy_layer(model, layer, 0))
    yield Edit(
        "attention of a layer zeroed", lambda model, seed: model.model.layers[layer].self_attn.o_proj.weight.zero_()
    )


def _embeddings() -> Iterator[Edit]:
    embedding = "model.embed_tokens"
    yield Edit("embedding rows shuffled", _on(embedding, _shuffle_some(0.1)), embedding)
    yield Edit("embedding rows zeroed", _on(embedding, _zero_some(0.1)), embedding)
    yield Edit("embedding rows replaced by noise", _on(embedding, _noise_some(0.1)), embedding)


def _some(weight: Tensor, share: float, seed: torch.Generator) -> Tensor:
    return torch.randperm(len(weight), generator=seed)[: max(2, int(share * len(weight)))]


def _shuffle_some(share: float) -> Callable[[Tensor, torch.Generator], None]:
    def damage(weight: Tensor, seed: torch.Generator) -> None:
        rows = _some(weight, share, seed)
        weight[rows] = weight[rows.roll(1)]

    return damage


def _zero_some(share: float) -> Callable[[Tensor, torch.Generator], None]:
    def damage(weight: Tensor, seed: torch.Generator) -> None:
        weight[_some(weight, share, seed)] = 0

    return damage


def _noise_some(share: float) -> Callable[[Tensor, torch.Generator], None]:
    def damage(weight: Tensor, seed: torch.Generator) -> None:
        rows = _some(weight, share, seed)
        weight[rows] = torch.randn(len(rows), weight.shape[1], generator=seed) * weight.std()

    return damage


# -- how they are made -------------------------------------------------------------------------------------------------


def _rtn(name: str, scheme: Scheme) -> Edit:
    return Edit(name, lambda model, seed: quantize_model(model, Plan(scheme, scope="all"), measure=False))


def _each(model: Any, change: Callable[[Tensor], Any]) -> None:
    for target in find_weights(model):
        if target.role.value in ("attention", "ffn"):
            change(target.parameter)


def _round_trip(dtype: torch.dtype) -> Callable[[Any, torch.Generator], None]:
    return lambda model, seed: [parameter.copy_(parameter.to(dtype)) for parameter in model.parameters()]


def _noise(size: float) -> Callable[[Any, torch.Generator], None]:
    def apply(model: Any, seed: torch.Generator) -> None:
        _each(model, lambda weight: weight.add_(torch.randn(weight.shape, generator=seed) * weight.std() * size))

    return apply


def _prune(share: float) -> Callable[[Any, torch.Generator], None]:
    """By magnitude, within each row."""

    def prune(weight: Tensor) -> None:
        dropped = weight.abs().argsort(dim=1)[:, : int(share * weight.shape[1])]
        weight.scatter_(1, dropped, 0.0)

    return lambda model, seed: _each(model, prune)


def _wrong_axis(model: Any, seed: torch.Generator) -> None:
    """Codes of one scale a row, dequantized with scales in another order."""

    def damage(weight: Tensor) -> None:
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        weight.div_(scale).round_().mul_(scale.roll(1, 0))

    _each(model, damage)


def _stale_scales(model: Any, seed: torch.Generator) -> None:
    """Codes dequantized with the scales of another layer of the same shape."""
    kept: dict[torch.Size, Tensor] = {}

    def damage(weight: Tensor) -> None:
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        other = kept.get(weight.shape, scale)
        kept[weight.shape] = scale
        weight.div_(scale).round_().mul_(other)

    _each(model, damage)


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


def _orthogonal(size: int, seed: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=seed, dtype=torch.float64))[0].float()


def _rotate_values(model: Any, seed: torch.Generator) -> None:
    """The values of each head in another basis, which the output projection turns back."""
    heads, groups, size = _head_shapes(model)
    for layer in model.model.layers:
        attention, rotation = layer.self_attn, _orthogonal(size, seed)
        values, outputs = attention.v_proj.weight, attention.o_proj.weight
        values.copy_((rotation.T @ values.view(groups, size, -1)).view(values.shape))
        outputs.copy_((outputs.view(-1, heads, size) @ rotation).view(outputs.shape))


def _flip_signs(model: Any, seed: torch.Generator) -> None:
    for layer in model.model.layers:
        signs = torch.sign(torch.randn(layer.mlp.up_proj.weight.shape[0], generator=seed))
        layer.mlp.up_proj.weight.mul_(signs[:, None])
        layer.mlp.down_proj.weight.mul_(signs)


def _readers(layer: Any) -> list[tuple[Any, list[nn.Linear]]]:
    """Each norm of a layer with the projections that read it."""
    attention, mlp = layer.self_attn, layer.mlp
    return [
        (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
        (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
    ]


def _norms(model: Any) -> list[Any]:
    return [norm for layer in model.model.layers for norm, _ in _readers(layer)]


def _rescale_norms(model: Any, seed: torch.Generator) -> None:
    for layer in model.model.layers:
        for norm, readers in _readers(layer):
            factor = torch.exp(0.5 * torch.randn(norm.weight.shape, generator=seed))
            norm.weight.mul_(factor)
            for reader in readers:
                reader.weight.div_(factor)


def _fold_norms(model: Any, seed: torch.Generator) -> None:
    for layer in model.model.layers:
        for norm, readers in _readers(layer):
            for reader in readers:
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1)


def _permute_residual(model: Any, seed: torch.Generator) -> None:
    order = torch.randperm(model.config.hidden_size, generator=seed)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, order])
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.weight.copy_(model.lm_head.weight[:, order])
    model.model.norm.weight.copy_(model.model.norm.weight[order])
    for layer in model.model.layers:
        for norm, readers in _readers(layer):
            norm.weight.copy_(norm.weight[order])
            for reader in readers:
                reader.weight.copy_(reader.weight[:, order])
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(writer.weight[order])


def _rotate_residual(model: Any, seed: torch.Generator) -> None:
    """Norms folded, then every reader and writer in another basis of the residual stream (Ashkboos et al. 2024)."""
    _fold_norms(model, seed)
    model.lm_head.weight.mul_(model.model.norm.weight)
    model.model.norm.weight.fill_(1)
    rotation = _orthogonal(model.config.hidden_size, seed)
    for reader in (model.model.embed_tokens, model.lm_head):
        reader.weight.copy_(reader.weight @ rotation)
    for layer in model.model.layers:
        for _, readers in _readers(layer):
            for reader in readers:
                reader.weight.copy_(reader.weight @ rotation)
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(rotation.T @ writer.weight)


def _untie(model: Any, seed: torch.Generator) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def _swap(model: Any, one: int, other: int) -> None:
    kept = {name: tensor.clone() for name, tensor in model.model.layers[one].state_dict().items()}
    model.model.layers[one].load_state_dict(model.model.layers[other].state_dict())
    model.model.layers[other].load_state_dict(kept)


def _copy_layer(model: Any, target: int, source: int) -> None:
    model.model.layers[target].load_state_dict(model.model.layers[source].state_dict())
