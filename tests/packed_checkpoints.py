"""Tiny checkpoints in the layouts in which others pack weights, each beside the model that it is made of."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from conftest import DEMO
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from invarlock.exporters.gguf import _write_configuration, _write_tokenizer
from invarlock.testing import architectures

BASE = "dense"
FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int"}
SCHEMES: dict[str, Any] = {
    "fp8-tensor": FP8 | {"strategy": "tensor"},
    "fp8-channel": FP8 | {"strategy": "channel"},
    "fp8-block": FP8 | {"strategy": "block", "block_structure": [16, 24]},
    "fp8-static-activations": "FP8",
    "fp8-dynamic-activations": "FP8_DYNAMIC",
    "nvfp4": "NVFP4A16",
    "nvfp4-activations": "NVFP4",
    "mxfp4": "MXFP4A16",
    "mxfp6": "MXFP6A16",
    "mxfp8": "MXFP8A16",
    "int8-channel": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int8-activations": "W8A8",
    "int4-group": INT4 | {"strategy": "group", "group_size": 16},
    "int4-asymmetric": INT4 | {"strategy": "group", "group_size": 16, "symmetric": False},
    "int3-group": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32},
}
"""Schemes of compressed-tensors: arguments of the weights, or a preset of the library."""
MIXED = {"re:.*self_attn.*": SCHEMES["fp8-channel"], "re:.*mlp.*": SCHEMES["int4-group"]}


def compressed(folder: Path, groups: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """A Llama that compressed-tensors itself rounded, packed and saved; the model before lies in ``BASE``.

    :param groups: a scheme for each target.
    """
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    model = architectures.llama(intermediate_size=64).to(dtype)
    model.save_pretrained(BASE)
    described = {f"group_{place}": _scheme(*group) for place, group in enumerate(groups.items())}
    apply_quantization_config(model, QuantizationConfig(config_groups=described, ignore=["lm_head"]))
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            _calibrate(module, module.quantization_scheme.weights)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def _scheme(target: str, scheme: Any) -> Any:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    if isinstance(scheme, str):
        return preset_name_to_scheme(scheme, [target])
    return QuantizationScheme(targets=[target], weights=QuantizationArgs(**scheme))


def _calibrate(module: Any, weights: Any) -> None:
    """Scales by the library's own formula, from the extremes of each unit."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weight = module.weight.data
    units = _units(weight, weights)
    factor = None
    if weights.strategy == "tensor_group":
        factor = generate_gparam(weight.min(), weight.max())
        module.weight_global_scale.data.copy_(factor)
    scale, zero = calculate_qparams(units.amin(-1), units.amax(-1), weights, global_scale=factor)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    for name in ("input_scale", "input_global_scale"):
        if hasattr(module, name):
            getattr(module, name).data.fill_(0.05)


def _units(weight: Tensor, weights: Any) -> Tensor:
    """Numbers that share a scale along the last axis."""
    if weights.strategy == "tensor":
        return weight.reshape(1, -1)
    if weights.strategy == "channel":
        return weight
    if weights.strategy == "block":
        height, width = weights.block_structure
        rows, columns = (-(-size // part) for size, part in zip(weight.shape, (height, width), strict=True))
        padded = weight.new_zeros(rows * height, columns * width)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        return padded.view(rows, height, columns, width).transpose(1, 2).flatten(2)
    return weight.unflatten(1, (-1, weights.group_size))


def words(codes: Tensor, bits: int = 4, order: Iterable[int] | None = None) -> Tensor:
    """Codes as words of 32 bits along the last axis."""
    if 32 % bits:
        each = np.unpackbits(codes.byte().unsqueeze(-1).numpy(), axis=-1, bitorder="little")[..., :bits]
        return torch.from_numpy(np.packbits(each.reshape(len(codes), -1), axis=-1, bitorder="little")).view(torch.int32)
    count = 32 // bits
    grouped = codes.long().unflatten(-1, (-1, count))
    packed = sum(grouped[..., which] << bits * place for place, which in enumerate(order or range(count)))
    return packed.to(torch.uint32).view(torch.int32)


BITSANDBYTES = {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}


def torchao(config: str) -> dict[str, Any]:
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": config, "_version": 2, "_data": {}}}}


HOW: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False},
    "gptq_v2": {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2", "sym": False},
    "gptq-8": {"quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": True, "sym": False},
    "gptq-channel": {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": False},
    "gptq-3": {"quant_method": "gptq", "bits": 3, "group_size": 32, "desc_act": True, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "mlx": {"bits": 4, "group_size": 32},
    "mlx-8": {"bits": 8, "group_size": 64},
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "nf4": BITSANDBYTES | {"load_in_4bit": True},
    "nf4-nested": BITSANDBYTES | {"load_in_4bit": True, "bnb_4bit_use_double_quant": True},
    "llm-int8": BITSANDBYTES | {"load_in_8bit": True},
    "modelopt-fp8": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "modelopt-fp8-block": {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"},
    "modelopt-nvfp4": {
        "quant_method": "modelopt",
        "quant_algo": "NVFP4",
        "group_size": 16,
    },
    "modelopt-int8": {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"},
    "modelopt-mxfp8": {"quant_method": "modelopt", "quant_algo": "MXFP8", "group_size": 32},
    "modelopt-int4": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32},
    "auto-round": AUTO_ROUND
    | {
        "packing_format": "auto_round:auto_gptq",
        "extra_config": {"model.layers.0.mlp.down_proj": {"bits": 8}},
    },
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-int4": torchao("IntxWeightOnlyConfig"),
    "torchao-fp8": torchao("Float8WeightOnlyConfig"),
    "auto-round-awq": AUTO_ROUND | {"packing_format": "auto_round:auto_awq"},
}


def packed_as(method: str, folder: Path, activations: Any = None) -> dict[str, Tensor]:
    """A small Qwen2, which has biases, as a method of ``HOW`` stores it; its weights and biases, by name.

    :param activations: how torchao says that inputs are rounded.
    """
    config = transformers.Qwen2Config(
        vocab_size=1024, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).half()
    state, weights, how = model.state_dict(), {}, HOW[method]
    del state["lm_head.weight"]
    for name in [name for name in state if name.endswith("proj.weight")]:
        stem, weight = name.removesuffix(".weight"), state.pop(name)
        if f"{stem}.bias" in state:
            state[f"{stem}.bias"].normal_()
        own = how | how.get("extra_config", {}).get(stem, {})
        weights[name], stored = _packer(how)(method, weight.float(), own)
        state |= {f"{stem}.{part}": tensor for part, tensor in stored.items()}
    model.save_pretrained(BASE)
    config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text()) | {"architectures": ["Qwen2ForCausalLM"]}
    if method == "modelopt-nvfp4":
        # As its first versions wrote it.
        described = {"producer": {"name": "modelopt"}, "quantization": how}
        (folder / "hf_quant_config.json").write_text(json.dumps(described))
    else:
        settings |= {"quantization_config": how, **({} if "quant_method" in how else {"quantization": how})}
    (folder / "config.json").write_text(json.dumps(settings))
    contiguous = {name: tensor.contiguous() for name, tensor in state.items()}
    header = (
        {name: _described(method, weight, activations) for name, weight in weights.items()}
        if "torchao" in method
        else {}
    )
    save_file(contiguous, folder / "model.safetensors", {"format": "pt"} | header)
    return weights | {name: tensor.float() for name, tensor in state.items() if name.endswith(".bias")}


def _packer(how: Mapping[str, Any]) -> Any:
    if "quant_algo" in how:
        return _by_modelopt
    if how.get("quant_method") == "torchao":
        return _by_torchao
    return _by_bitsandbytes if how.get("quant_method") == "bitsandbytes" else _stored


def _stored(method: str, weight: Tensor, how: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """A weight after rounding, and the tensors that stand for it."""
    if method == "fp8":
        blocks = weight.unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        rounded = codes.float() * scale[:, None, :, None]
        return rounded.view(weight.shape), {"weight": codes.view(weight.shape), "weight_scale_inv": scale}
    bits, inputs = how["bits"], weight.shape[1]
    size, most = how["group_size"], 2**bits - 1
    size = inputs if size < 0 else size
    order = torch.randperm(inputs) if how.get("desc_act") else torch.arange(inputs)
    groups = weight[:, order].unflatten(1, (-1, size))
    scale = ((groups.amax(-1) - groups.amin(-1)) / most).half()
    if method.startswith("mlx"):
        bias = groups.amin(-1).half()
        codes = ((groups - bias.unsqueeze(-1)) / scale.unsqueeze(-1)).round().clamp(0, most)
        rounded = codes * scale.float().unsqueeze(-1) + bias.float().unsqueeze(-1)
        packed = words(codes.flatten(1), bits).view(torch.uint32)
        return rounded.flatten(1), {"weight": packed, "scales": scale, "biases": bias}
    zeros = (-groups.amin(-1) / scale).round().clamp(1, most)
    codes = (groups / scale.unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, most)
    back = order.argsort()
    rounded = ((codes - zeros.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1)[:, back]
    codes = codes.flatten(1)[:, back]
    if method.endswith("awq"):
        places = (0, 2, 4, 6, 1, 3, 5, 7)
        stored = {"qweight": words(codes.T, order=places), "qzeros": words(zeros.T, order=places)}
        return rounded, stored | {"scales": scale.T}
    first = 0 if method == "gptq_v2" else 1
    index = (torch.arange(inputs) // size)[back].int()
    stored = {"qweight": words(codes, bits).T, "qzeros": words(zeros.T - first, bits)}
    return rounded, stored | {"scales": scale.T, "g_idx": index}


def _by_modelopt(method: str, weight: Tensor, how: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``_stored``; one factor for each input smooths INT4."""
    if method == "modelopt-fp8":
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return codes.float() * scale, {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.05)}
    if method == "modelopt-fp8-block":
        blocks = weight.unflatten(0, (-1, 64)).unflatten(2, (-1, 32))
        scale = blocks.abs().amax((1, 3), keepdim=True) / 448
        codes = (blocks / scale).to(torch.float8_e4m3fn)
        return (codes.float() * scale).view(weight.shape), {"weight": codes.view(weight.shape), "weight_scale": scale}
    if method == "modelopt-int8":
        scale = weight.abs().amax(1) / 127
        codes = (weight / scale.unsqueeze(1)).round()
        return codes * scale.unsqueeze(1), {"weight": codes.to(torch.int8), "weight_scale": scale}
    blocks = weight.unflatten(1, (-1, how["group_size"]))
    if method == "modelopt-mxfp8":
        exponents = blocks.abs().amax(-1).log2().floor() - 8
        codes = (blocks / 2 ** exponents.unsqueeze(-1)).clamp(-448, 448).to(torch.float8_e4m3fn)
        rounded = (codes.float() * 2 ** exponents.unsqueeze(-1)).flatten(1)
        return rounded, {"weight": codes.flatten(1), "weight_scale": (exponents + 127).byte()}
    if method == "modelopt-nvfp4":
        second = weight.abs().max() / (6 * 448)
        scale = (blocks.abs().amax(-1) / 6 / second).to(torch.float8_e4m3fn)
        spread = scale.float().unsqueeze(-1) * second
        known = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = ((blocks / spread).abs().unsqueeze(-1) - known).abs().argmin(-1)
        rounded = (known[nearest] * spread).copysign(blocks).flatten(1)
        codes = (nearest + 8 * (blocks < 0)).flatten(1).byte()
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return rounded, {"weight": packed, "weight_scale": scale, "weight_scale_2": second, "input_scale": second * 2}
    smoothing = torch.linspace(0.5, 2, weight.shape[1])
    blocks = (weight / smoothing).unflatten(1, (-1, how["group_size"]))
    scale = blocks.abs().amax(-1) / 7
    codes = (blocks / scale.unsqueeze(-1)).round().flatten(1)
    rounded = codes * scale.repeat_interleave(how["group_size"], 1) * smoothing
    packed = (codes[::2].to(torch.int8) & 15 | codes[1::2].to(torch.int8) << 4).view(torch.uint8)
    return rounded, {"weight": packed, "weight_scale": scale, "pre_quant_scale": smoothing}


def _by_torchao(method: str, weight: Tensor, how: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``_stored``; 4 bits in groups of 32, else for each channel."""
    groups = weight.unflatten(1, (-1, 32 if method == "torchao-int4" else weight.shape[1]))
    most = {"torchao-int8": 127, "torchao-int4": 7, "torchao-fp8": 448}[method]
    scale = groups.abs().amax(-1) / most
    numbers, zero = groups / scale.unsqueeze(-1), torch.zeros_like(scale).to(torch.int8)
    if method == "torchao-fp8":
        codes = numbers.to(torch.float8_e4m3fn)
        stored = {"_weight_qdata": codes.flatten(1), "_weight_scale": scale}
        return (codes.float() * scale.unsqueeze(-1)).flatten(1), stored
    zero = zero + (1 if method == "torchao-int4" else 0)
    codes = (numbers + zero.unsqueeze(-1)).round().clamp(-most - 1, most)
    stored = {"_weight_qdata": codes.flatten(1).to(torch.int8), "_weight_scale": scale, "_weight_zero_point": zero}
    return ((codes - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).flatten(1), stored


def _described(method: str, weight: Tensor, activations: Any) -> str:
    """The description of a weight in the header of its file, as torchao writes it."""
    kinds = {"torchao-int8": "Int8Tensor", "torchao-int4": "IntxUnpackedToInt8Tensor", "torchao-fp8": "Float8Tensor"}
    data: dict[str, Any] = {
        "block_size": [1, 32 if method == "torchao-int4" else weight.shape[1]],
        "dtype": {"_type": "torch.dtype", "_data": "float32"},
        "activation_quantization" if method == "torchao-int4" else "act_quant_kwargs": activations,
    }
    if method == "torchao-int4":
        data["target_dtype"] = {"_type": "torch.dtype", "_data": "int4"}
    parts = ["qdata", "scale", *([] if method == "torchao-fp8" else ["zero_point"])]
    return json.dumps({"_type": kinds[method], "_data": data, "_tensor_data_names": parts})


def _by_bitsandbytes(method: str, weight: Tensor, how: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """As ``_stored``; a level of its map is as good as another for the layout."""
    if method == "llm-int8":
        scale = weight.abs().amax(1)
        codes = (weight / scale.unsqueeze(1) * 127).round()
        return codes * scale.unsqueeze(1) / 127, {"weight": codes.to(torch.int8), "SCB": scale}
    levels, blocks = torch.linspace(-1, 1, 16), weight.reshape(-1, 64)
    absmax = blocks.abs().amax(1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": list(weight.shape)}
    stored = {"weight.quant_map": levels, "weight.absmax": absmax}
    if method == "nf4-nested":
        offset, nested_levels = float(absmax.mean()), torch.linspace(-1, 1, 256)
        parts = (absmax - offset).split(256)
        nested = torch.stack([part.abs().max() for part in parts])
        places = [(part / largest).unsqueeze(1) - nested_levels for part, largest in zip(parts, nested, strict=True)]
        numbers = torch.cat([place.abs().argmin(1) for place in places])
        absmax = nested_levels[numbers] * nested.repeat_interleave(256)[: len(numbers)] + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        stored |= {"weight.absmax": numbers.byte(), "weight.nested_absmax": nested}
        stored["weight.nested_quant_map"] = nested_levels.clone()
    codes = ((blocks / absmax.unsqueeze(1)).unsqueeze(-1) - levels).abs().argmin(-1)
    rounded = (levels[codes] * absmax.unsqueeze(1)).view(weight.shape)
    pairs = codes.byte().view(-1, 2)
    stored["weight"] = (pairs[:, :1] << 4) | pairs[:, 1:]
    stored["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return rounded, {name: tensor.clone() for name, tensor in stored.items()}


def changed(folder: Path, part: str, change: Any) -> str:
    """Change the first stored tensor whose name ends so, or remove it; its name."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith(part))
    stored = tensors.pop(name)
    tensors |= {name: change(stored).contiguous()} if change else {}
    save_file(tensors, path, header)
    return name


BLOCKS = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
    "TQ1_0", "TQ2_0", "MXFP4", "NVFP4",
]  # fmt: skip
"""Types of GGUF that the package of this name dequantizes."""


def in_gguf(kind: str, path: Path) -> dict[str, Tensor]:
    """A Llama in a file whose matrices are blocks of one type; the model before lies in ``BASE``, and its tokenizer.

    :returns: what the package ``gguf`` makes of the blocks, by the names in the file.
    """
    import gguf

    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    model = architectures.llama(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=4,
        tie_word_embeddings=True,
    )  # fmt: skip
    model.save_pretrained(BASE)
    tokenizer.save_pretrained(BASE)
    type_ = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    _write_configuration(writer, model.config, gguf.LlamaFileType.ALL_F32)
    _write_tokenizer(writer, Path(BASE), tokenizer, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    wanted = {}
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        theirs = f"{names.get_name(stem)}.{suffix}"
        if name.endswith("proj.weight"):
            blocks = _blocks(type_, tuple(tensor.shape))
            writer.add_tensor(theirs, blocks, raw_dtype=type_)
            wanted[theirs] = torch.from_numpy(gguf.dequantize(blocks, type_).copy())
        elif name != "lm_head.weight":
            writer.add_tensor(theirs, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return wanted


def _blocks(type_: Any, shape: tuple[int, int]) -> np.ndarray:
    """Bytes drawn at random, block by block, until all are numbers from -1 to 1: no package writes each type."""
    import gguf

    size, nbytes = gguf.GGML_QUANT_SIZES[type_]
    generator = np.random.default_rng(0)
    blocks = np.zeros((shape[0] * shape[1] // size, nbytes), dtype=np.uint8)
    left = np.arange(len(blocks))
    while len(left):
        blocks[left] = generator.integers(0, 256, (len(left), nbytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            numbers = gguf.dequantize(blocks[left], type_)
        largest = np.abs(np.nan_to_num(numbers, nan=np.inf)).max(1)
        left = left[~((largest < 1) & (largest > 1e-3))]
    return blocks.reshape(shape[0], -1)
