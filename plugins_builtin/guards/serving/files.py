"""Declarations of a checkpoint's files, held against what they store: packing, tied weights, sets of weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plugins_builtin.packing import experts_among, left_out, packed_modules, plain_modules

CACHE_SCALES = re.compile(r"\.(k_scale|v_scale|kv_scale|k_proj\.output_scale|v_proj\.output_scale)$")
ACTIVATION_SCALES = re.compile(r"\.(input_scale|input_global_scale|act_scale|activation_scale)$")
SCALES = re.compile(f"{CACHE_SCALES.pattern}|{ACTIVATION_SCALES.pattern}")
"""Of what is computed while a model is served: they have no place among its weights."""
UNSEEN_METHODS = ("torchao", "quanto", "hqq", "eetq", "vptq", "higgs", "spqr", "aqlm", "bitnet")
"""Methods that name their tensors otherwise; their checkpoints are not held against what they declare."""


def new_problems(before: Sequence[str], after: Sequence[str]) -> list[str]:
    """Problems of the edited side's files that the baseline's do not have."""
    return [problem for problem in after if problem not in before]


def problems_of(model: Any, folder: str | None) -> list[str]:
    """Contradictions within one checkpoint folder; none for a file, or a folder that is not of transformers."""
    from invarlock.api import Checkpoint, InputError, read_json

    if folder is None or not Path(folder, "config.json").is_file():
        return []
    config = read_json(Path(folder, "config.json"))
    try:
        stored = Checkpoint(Path(folder))
    except InputError:
        # Whoever loaded it has told what is wrong.
        return []
    at = Path(folder)
    return [
        *_sets(at, stored.files),
        *_templates(at),
        *_tie(model, config, stored),
        *_packing(model, config, list(stored)),
    ]


def unread(before: Collection[str], after: Collection[str]) -> Iterator[str]:
    """Stored tensors that have no place in the edited model, and were not beside the baseline's."""
    new = sorted(name for name in set(after) - set(before) if not SCALES.search(name))
    if new:
        more = f" and {len(new) - 3} more" if len(new) > 3 else ""
        found = ", ".join(new[:3]) + more
        yield f"stored without a place in the model: {found}; some loaders pass over that, others fail"


def _sets(folder: Path, read: Sequence[str]) -> Iterator[str]:
    """:param read: the files of the set that transformers reads."""
    names = sorted(path.name for path in folder.iterdir())
    kinds = {
        "model.safetensors": any(name == "model.safetensors" for name in names),
        "model.safetensors.index.json": "model.safetensors.index.json" in names,
        "pytorch_model.bin": any(name.startswith("pytorch_model") and ".bin" in name for name in names),
        "consolidated weights": any(name.startswith("consolidated") for name in names),
        "a GGUF file": any(name.endswith(".gguf") for name in names),
    }
    # Some servers read every file of this kind in a folder.
    stray = [name for name in names if name.endswith(".safetensors") and name not in read]
    others = [name for name in stray if not name.startswith(("consolidated", "model.safetensors", "adapter_"))]
    found = [*(kind for kind, there in kinds.items() if there), *others[:1]]
    if len(found) > 1:
        yield f"{len(found)} sets of weights, {', '.join(found)}: loaders disagree on which to read"


def _templates(folder: Path) -> Iterator[str]:
    """Two chat templates, of which older loaders read the one that newer ones pass over."""
    from invarlock.api import read_json

    file, beside = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not (file.is_file() and beside.is_file()):
        return
    other = read_json(beside).get("chat_template")
    if isinstance(other, str) and other.strip() != file.read_text(encoding="utf-8").strip():
        yield "chat_template.jinja and chat_template of tokenizer_config.json differ: loaders disagree on which to read"


def _tie(model: Any, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Iterator[str]:
    """A flag that ties the head to the embedding, and a stored head that is another one."""
    import torch

    from invarlock.api import input_embeddings, output_head

    flag = config.get("tie_word_embeddings", getattr(getattr(model, "config", None), "tie_word_embeddings", None))
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head, embedding = (
        output_head(model),
        input_embeddings(model),
    )
    pair = [names.get(id(module), "") for module in (head, embedding)]
    if flag and all(name in stored for name in pair) and pair[0] != pair[1]:
        one, other = (stored[name] for name in pair)
        if one.shape != other.shape or not torch.equal(one, other):
            yield (
                f"tie_word_embeddings is true, and {pair[0]} is stored and differs from {pair[1]}: some loaders read "
                "it, others tie it"
            )


def _packing(model: Any, config: Mapping[str, Any], stored: Sequence[str]) -> Iterator[str]:
    section = config.get("quantization_config") or config.get("compression_config")
    if not isinstance(section, Mapping) or str(section.get("quant_method", "")).startswith(UNSEEN_METHODS):
        return
    method = str(section.get("quant_method", "unknown method"))
    packed = packed_modules(stored)
    groups = section.get("config_groups")
    of_weights = not isinstance(groups, Mapping) or any(_scheme(group, "weights") for group in groups.values())
    bits = _bits(section)
    declared = f"quantization_config declares {f'{bits} bits' if bits else method}"
    if of_weights and not packed and groups != {}:
        yield f"{declared}, and nothing is quantized"
    elif left := [name for name in _expected(model, section, stored) if not _is_ignored(name, section)]:
        yield f"{declared}, and {_count(left, packed)}"
    if ignored := sorted(name for name in packed if _is_ignored(name, section)):
        yield f"{declared}, and its ignore list names {len(ignored)} packed weights: {', '.join(ignored[:3])}"
    cache = section.get("kv_cache_scheme") or section.get("kv_cache_quant_algo")
    if (
        cache
        and not (isinstance(cache, Mapping) and cache.get("dynamic"))
        and not any(map(CACHE_SCALES.search, stored))
    ):
        yield f"scales of the {_type(cache)} key-value cache are missing"
    schemes = [_scheme(group, "input_activations") for group in groups.values()] if isinstance(groups, Mapping) else []
    if any(scheme and not scheme.get("dynamic") for scheme in schemes) and not any(
        map(ACTIVATION_SCALES.search, stored)
    ):
        yield "scales of the activations are missing"


def _expected(model: Any, section: Mapping[str, Any], stored: Sequence[str]) -> list[str]:
    """Plain modules that a loader would look for packed: of a kind that is packed elsewhere, or of a class named."""
    from torch import nn

    from invarlock.api import output_head

    groups = section.get("config_groups")
    targets = [group.get("targets") for group in groups.values()] if isinstance(groups, Mapping) else []
    named = set()
    if any("Linear" in target for target in targets if target):
        head = output_head(model)
        named = {name for name, each in model.named_modules() if isinstance(each, nn.Linear) and each is not head}
    return sorted({*left_out(stored), *named.intersection(plain_modules(stored))})


def _scheme(group: Any, name: str) -> Mapping[str, Any] | None:
    scheme = group.get(name) if isinstance(group, Mapping) else None
    return scheme if isinstance(scheme, Mapping) else None


def _bits(section: Mapping[str, Any]) -> int | None:
    groups = section.get("config_groups")
    if isinstance(groups, Mapping):
        found = [scheme.get("num_bits") for group in groups.values() if (scheme := _scheme(group, "weights"))]
        return found[0] if found and isinstance(found[0], int) else None
    for key in ("bits", "w_bit", "num_bits"):
        if isinstance(section.get(key), int):
            return int(section[key])
    return 4 if section.get("load_in_4bit") else 8 if section.get("load_in_8bit") else None


def _type(cache: Any) -> str:
    if not isinstance(cache, Mapping):
        return str(cache)
    return f"{'FP' if cache.get('type') == 'float' else 'INT'}{cache.get('num_bits', '')}"


def _count(left: Sequence[str], packed: set[str]) -> str:
    """The share of the weights that are not quantized, or of the experts of their layers, and the first ones."""
    kind, missed, total = "weights", list(left), len(left) + len(packed)
    if all(experts_among([name]) for name in left):
        layers = experts_among(left)
        others = [expert for expert, layer in experts_among(packed).items() if layer in layers.values()]
        kind, missed, total = "experts", list(layers), len({*layers, *others})
    shown = f"{', '.join(missed[:3])}{' ...' if len(missed) > 3 else ''}"
    return f"{len(missed)} of {total} {kind} {'is' if len(missed) == 1 else 'are'} not quantized: {shown}"


def _is_ignored(name: str, section: Mapping[str, Any]) -> bool:
    keys = ("ignore", "modules_to_not_convert", "ignored_layers")
    return any(_matches(str(pattern), name) for key in keys for pattern in section.get(key) or [])


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error:
            return False
    # Names may have been written under another root.
    return name == pattern or f".{pattern}." in f".{name}." or pattern.endswith(f".{name}")
