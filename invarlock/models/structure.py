"""The structure of a model: its blocks, its output head, and the role of each of its weights.

A block is an element of an outermost ``nn.ModuleList``: one layer of a transformer. The role of a weight follows from
the types of the modules around it and their places in the tree, never from how its path is spelled: BERT's
``attention.output.dense`` is attention because it is inside a ``BertAttention``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from itertools import accumulate

from torch import Tensor, nn

# FNet mixes tokens by a Fourier transform, which has no weights, in the place of attention.
_ATTENTION = re.compile("attention|attn|mla$|fourier", re.IGNORECASE)
_ROUTER = re.compile(r"router|gating$|moe\w*gate$", re.IGNORECASE)
_FFN = re.compile("mlp|feed_?forward|ffn|expert|moe", re.IGNORECASE)
_DENSE_FFN = re.compile("mlp|feed_?forward|ffn", re.IGNORECASE)
_RECURRENT = re.compile(r"mamba|mixer|deltanet|recurrent\w*block|shortconv", re.IGNORECASE)


class Role(StrEnum):
    """Purpose of a weight."""

    ATTENTION = "attention"
    FFN = "ffn"
    ROUTER = "router"
    EMBEDDING = "embedding"
    HEAD = "head"
    OTHER = "other"


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks that have weights, by path; one that stands in several places comes once."""
    modules = dict(model.named_modules())
    return {path: module for path, module in modules.items() if block_of(modules, path) == path and has_weights(module)}


def block_of(modules: Mapping[str, nn.Module], path: str) -> str | None:
    """Path of the block that holds a module or is it; None outside of blocks.

    :param modules: every module on the way to ``path``, by path.
    """
    return next(iter(_lineage(modules, path)), None)


def has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, or None where the model has no such module."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    head = head if head is not None else getattr(model, "lm_head", None)
    return head if isinstance(head, nn.Module) else None


def is_backbone(model: nn.Module) -> bool:
    """True if a model of transformers has no head: it gives hidden states or vectors, and no scores."""
    return output_head(model) is None and getattr(model, "base_model", None) is model


def predicts_tokens(model: nn.Module) -> bool:
    """False for a model of transformers that has no head for tokens: it gives vectors, or labels of whole samples."""
    return output_head(model) is not None or not hasattr(model, "base_model")


def reads_images_alone(model: nn.Module) -> bool:
    """True for a model that is given images and no tokens, as transformers tells."""
    return getattr(model, "main_input_name", None) == "pixel_values"


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that turns token ids into hidden states, or None where the model has no such module, or two towers."""
    if reads_images_alone(model):
        # It names the module that makes patches of an image.
        return None
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return None
    return embeddings if isinstance(embeddings, nn.Module) else None


def is_conv1d(module: nn.Module) -> bool:
    """True if a module is a linear layer of GPT-2, which stores its weight as (in, out)."""
    # By name, because transformers need not be installed, and a model without it has no such class.
    return any(base.__name__ == "Conv1D" for base in type(module).__mro__)


def is_router(module: nn.Module) -> bool:
    return bool(_ROUTER.search(type(module).__name__))


def is_experts(module: nn.Module) -> bool:
    """True if a module holds the weights of all experts of a layer, fused."""
    return "Experts" in type(module).__name__


def role_of(model: nn.Module, modules: Mapping[str, nn.Module], path: str, parameter: Tensor) -> Role:
    """Role of a parameter of the module at ``path``.

    :param modules: all modules of the model, by path.
    """
    if modules[path] is output_head(model):
        return Role.HEAD
    if isinstance(modules[path], nn.Embedding):
        return Role.EMBEDDING
    lineage = [modules[place] for place in _lineage(modules, path)]
    if not lineage:
        return Role.OTHER
    block, *inner = lineage
    kinds = [type(module).__name__ for module in inner]
    if any(map(is_router, inner)) or _gates_experts(lineage, parameter):
        return Role.ROUTER
    if any(map(_ATTENTION.search, kinds)):
        return Role.ATTENTION
    # A class may be called ...Moe...DeltaNet only for the model it is in.
    if any(map(_RECURRENT.search, kinds)):
        return _recurrent_role(modules, path)
    if any(map(_FFN.search, kinds)):
        return Role.FFN
    # BERT's intermediate, OPT's fc1, T5's wi: what is beside attention in a block, under whatever name.
    if any(_ATTENTION.search(type(module).__name__) for module in block.modules() if module is not block):
        return Role.FFN
    # A list of attentions beside a list of feed-forwards, as XLM has them: the block is the module itself.
    if _ATTENTION.search(type(block).__name__):
        return Role.ATTENTION
    # A convolutional network has nothing else in its blocks, be it a model or the tower of one.
    convolutional = reads_images_alone(model) or isinstance(modules[path], nn.Conv2d)
    return Role.FFN if convolutional or _DENSE_FFN.search(type(block).__name__) else Role.OTHER


def _recurrent_role(modules: Mapping[str, nn.Module], path: str) -> Role:
    """Role of a weight in a recurrent layer, which stands in for attention.

    Where there are no other layers, as in Mamba, it is the feed-forward, too (Gu and Dao 2023, section 3.4). Its short
    convolution is neither: it has no more numbers than a norm.
    """
    if isinstance(modules[path], nn.Conv1d):
        return Role.OTHER
    kinds = [type(module).__name__ for place, module in modules.items() if _lineage(modules, place)]
    others = any(_FFN.search(kind) or _ATTENTION.search(kind) for kind in kinds if not _RECURRENT.search(kind))
    return Role.ATTENTION if others else Role.FFN


def _lineage(modules: Mapping[str, nn.Module], path: str) -> list[str]:
    """Paths from the block that holds a module down to the module; empty outside of blocks."""
    prefixes = ["", *accumulate(path.split("."), "{}.{}".format)] if path else []
    for depth, prefix in enumerate(prefixes[:-1], start=1):
        if isinstance(modules[prefix], nn.ModuleList):
            return prefixes[depth:]
    return []


def _gates_experts(lineage: Sequence[nn.Module], parameter: Tensor) -> bool:
    """True if a matrix sits beside experts, in no feed-forward of its own, with one output for each of them or one."""
    if parameter.ndim != 2:
        return False
    for depth, parent in enumerate(lineage[:-1]):
        branch = lineage[depth + 1 :]
        if any(_DENSE_FFN.search(type(module).__name__) for module in branch):
            continue
        for name, child in parent.named_children():
            holds_experts = name == "experts" or is_experts(child)
            if holds_experts and child is not branch[0] and parameter.shape[0] in (1, _count_experts(child)):
                return True
    return False


def _count_experts(experts: nn.Module) -> int:
    if isinstance(experts, nn.ModuleList | nn.ModuleDict):
        return len(experts)
    return next((int(parameter.shape[0]) for parameter in experts.parameters()), 1)
