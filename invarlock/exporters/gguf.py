"""Export as GGUF for llama.cpp and what is built on it: Q4_0, Q5_0 and Q8_0, blocks of 32 codes and a float16 scale,
and Q4_1 and Q5_1, whose blocks have a float16 minimum besides.

The numbers are those of ``code * scale`` and ``code * scale + minimum``, as they stand in the model, exactly, because
weights are rounded to the same blocks and scales.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from invarlock.exporters.exporter import Exporter, SavedModel
from invarlock.quantization.rounding import RoundedWeight
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import WeightTarget

BLOCK = 32
TYPES = {(4, True): "Q4_0", (5, True): "Q5_0", (8, True): "Q8_0", (4, False): "Q4_1", (5, False): "Q5_1"}
"""By the bits of a code, and whether the grid is symmetric."""
ARCHITECTURES = ("llama", "qwen2")
FILE = "model.gguf"
USUAL = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
"""Taken for granted by those who read a file of these architectures."""
DIGITS = {"type": "Digits", "individual_digits": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
BYTES_OF_WORDS = BYTES | {"use_regex": True}


def _words(numbers: str) -> dict[str, Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


SPLITTING = {
    "gpt-2": [BYTES_OF_WORDS],
    "smollm": [DIGITS, BYTES_OF_WORDS],
    "qwen2": [_words(r"\p{N}"), BYTES],
    "llama-bpe": [_words(r"\p{N}{1,3}"), BYTES],
}
"""By llama.cpp's names of the rules by which text is split into words: the steps of tokenizer.json.

Source: llm_tokenizer_bpe in llama.cpp's src/llama-vocab.cpp."""


class Gguf(Exporter):
    name = "gguf"
    streams = False
    stores_codes = True
    mixes = True
    scale_dtype: torch.dtype | None = torch.float16
    library = "gguf"
    loading = f'from_pretrained(".", gguf_file="{FILE}")'

    def refuse(self, plan: Scheme, targets: Sequence[WeightTarget], model: Any, tokenizer: Any) -> str | None:
        kind_of_block = TYPES.get((plan.bitwidth, plan.symmetric))
        if plan.of_floats or kind_of_block is None or plan.group_size != BLOCK:
            bits = "4, 5 or 8" if plan.symmetric else "4 or 5"
            asked = f"set `bitwidth` {bits} and `group_size` {BLOCK}, not {plan.described}"
            return f"its blocks are {', '.join(TYPES.values())}, in groups of {BLOCK}: {asked}"
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind not in ARCHITECTURES:
            return f"it is written for {' and '.join(ARCHITECTURES)} models, and this one is {kind}"
        if (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") != "default":
            return "it is written for plain rotary embeddings, and this model scales its own"
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        if kind == "qwen2" and head * config.num_attention_heads != config.hidden_size:
            return f"a qwen2 file does not say that heads have {head} dimensions"
        unusual = [name for name, usual in USUAL.items() if getattr(config, name, usual) != usual]
        if unusual:
            return f"a {kind} file does not say that {unusual[0]} is {getattr(config, unusual[0])}"
        if find_spec("gguf") is None:
            return "the package gguf is missing: pip install 'invarlock[gguf]'"
        for target in targets:
            if type(target.module) is not nn.Linear or target.parameter.shape[1] % BLOCK:
                held = f"weights of Linear with a multiple of {BLOCK} inputs"
                return f"{kind_of_block} holds {held}, and {target.name} has shape {tuple(target.parameter.shape)}"
        if tokenizer is None or not _is_byte_level(tokenizer):
            return "the file holds its tokenizer, which has to be a byte-level BPE, and this model's is none"
        if _splitting(tokenizer) is None:
            known = "no name is known for how this model's tokenizer does it"
            return f"the file names how text is split into words, and {known}"
        return None

    def finish(self, folder: Path, saved: SavedModel) -> None:
        """Write ``model.gguf`` beside the tokenizer's own files."""
        import gguf

        model, config = saved.model, saved.model.config
        architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[config.model_type]
        writer = gguf.GGUFWriter(folder / FILE, config.model_type)
        _write_configuration(writer, config, gguf.LlamaFileType[f"MOSTLY_{_most_of(saved)}"])
        _write_tokenizer(writer, folder, saved.tokenizer, config.vocab_size)
        names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        for name, tensor in model.state_dict().items():
            if tied and name == "lm_head.weight":
                continue
            stem, _, suffix = name.rpartition(".")
            target = f"{names.get_name(stem)}.{suffix}"
            if parameters := saved.quantized.get(name):
                scheme = saved.schemes[name]
                blocks = _rotary_order(name, _blocks(tensor, parameters, scheme.bitwidth), config).cpu().numpy()
                writer.add_tensor(target, blocks, raw_dtype=gguf.GGMLQuantizationType[_type_of(scheme)])
            else:
                numbers, own = _plain(_rotary_order(name, tensor, config))
                writer.add_tensor(target, numbers, raw_dtype=own)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


EXPORTER = Gguf()


def _most_of(saved: SavedModel) -> str:
    """The type of most weights, which names the file's."""
    counts: Counter[str] = Counter()
    for name, scheme in saved.schemes.items():
        counts[_type_of(scheme)] += saved.model.get_parameter(name).numel()
    return counts.most_common(1)[0][0]


def _type_of(scheme: Scheme) -> str:
    return TYPES[scheme.bitwidth, scheme.symmetric]


def _write_configuration(writer: Any, config: Any, file_type: Any) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(file_type)


def _write_tokenizer(writer: Any, folder: Path, tokenizer: Any, rows: int) -> None:
    """The vocabulary, one entry for each row of the embedding."""
    import gguf

    words = {number: word for word, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_splitting(tokenizer))
    writer.add_token_list([words.get(number, f"[PAD{number}]") for number in range(rows)])
    writer.add_token_types(
        [
            kinds.UNUSED
            if number not in words
            else kinds.CONTROL
            if number in added and added[number].special
            else kinds.USER_DEFINED
            if number in added
            else kinds.NORMAL
            for number in range(rows)
        ]
    )
    vocabulary = gguf.SpecialVocab(folder, load_merges=True, n_vocab=rows)
    ids = tokenizer("a").input_ids
    # What is not said is taken from the name of the splitting.
    vocabulary.add_special_token |= {"bos": ids[0] == tokenizer.bos_token_id, "eos": ids[-1] == tokenizer.eos_token_id}
    vocabulary.add_to_gguf(writer, quiet=True)


def _described(tokenizer: Any) -> Any:
    """The content of its tokenizer.json."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _is_byte_level(tokenizer: Any) -> bool:
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    described = _described(tokenizer)
    return described["model"]["type"] == "BPE" and "ByteLevel" in json.dumps(described["decoder"])


def _splitting(tokenizer: Any) -> str | None:
    """llama.cpp's name for how a tokenizer splits text into words, or None."""
    described = _described(tokenizer)
    first = described["pre_tokenizer"] or {}
    steps = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in first.get("pretokenizers", [first])
    ]
    name = next((name for name, known in SPLITTING.items() if known == steps), None)
    # It looks whole words up first under this name alone.
    return name if bool(described["model"].get("ignore_merges")) == (name == "llama-bpe") else None


def _rotary_order(name: str, rows: Tensor, config: Any) -> Tensor:
    """Rows of Llama's queries and keys in llama.cpp's order: halves of each head's rotary dimensions interleaved."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2:][0])
    if config.model_type != "llama" or ".self_attn." not in name or heads is None:
        return rows
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _plain(tensor: Tensor) -> tuple[NDArray[Any], Any]:
    """A tensor that is not quantized, in its own type; vectors, as llama.cpp wants them, in float32."""
    import gguf

    if tensor.ndim == 1 or tensor.dtype == torch.float32:
        return tensor.float().cpu().numpy(), gguf.GGMLQuantizationType.F32
    if tensor.dtype == torch.float16:
        return tensor.cpu().numpy(), gguf.GGMLQuantizationType.F16
    return tensor.cpu().contiguous().view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16


def _blocks(rounded: Tensor, parameters: RoundedWeight, bits: int) -> Tensor:
    """Rows of blocks as bytes: for each block its float16 scale, the minimum where it has one, then 32 codes."""
    scales, minimums = parameters.scales.unsqueeze(-1), parameters.minimums
    head = [scales] if minimums is None else [scales, minimums.to(scales.dtype).unsqueeze(-1)]
    codes = parameters.codes(rounded).view(*scales.shape[:2], BLOCK)
    packed = codes.view(torch.uint8) if bits == 8 else _nibbles((codes + 2 ** (bits - 1)).to(torch.uint8), bits)
    return torch.cat([*(part.view(torch.uint8) for part in head), packed], dim=-1).flatten(1)


def _nibbles(codes: Tensor, bits: int) -> Tensor:
    """Codes of 4 or 5 bits: the fifth bits in front, then the first 16 codes and the last 16 side by side."""
    low, high = codes & 15, codes >> 4
    halves = low[..., : BLOCK // 2] | low[..., BLOCK // 2 :] << 4
    if bits == 4:
        return halves
    places = torch.tensor([1 << place for place in range(8)], dtype=torch.uint8, device=codes.device)
    return torch.cat([(high.view(*high.shape[:-1], -1, 8) * places).sum(-1, dtype=torch.uint8), halves], dim=-1)
