"""Parts of a reference as a tree of plain data and tensors, and back: types, shapes and numbers are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from invarlock.datasets.layout import UNSCORED, Windows
from invarlock.evaluation.passes import PassResult
from invarlock.evaluation.predictions import TokenRecord
from invarlock.evaluation.results import NoiseRun
from invarlock.search.fisher import BaselineFisher, Curvature

FORGED = (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError)
"""Exceptions of a tree that is not of this form."""
LARGEST_OF_8_BITS, TINY = torch.finfo(torch.float8_e4m3fn).max, 1e-30


def tree_of_windows(windows: Windows) -> dict[str, Any]:
    return {name: value for name, value in vars(windows).items() if value is not None}


def windows_of(tree: Mapping[str, Any]) -> Windows:
    windows = Windows(**tree)
    rows = len(windows.input_ids)
    tensors = {"input_ids", "attention_mask", "labels", "decoder_input_ids"} & tree.keys()
    for name in tensors:
        _check(tree[name], name, torch.int64, 2)
    if windows.documents is not None:
        _check(windows.documents, "documents", torch.int64, 1)
        tensors.add("documents")
    if windows.illustrated is not None:
        _check(windows.illustrated, "illustrated", torch.bool, 1)
        tensors.add("illustrated")
    if any(len(tensor) != rows for tensor in [*(tree[name] for name in tensors), *windows.media.values()]):
        raise ValueError("windows of different numbers")
    if windows.input_ids.shape != windows.attention_mask.shape:
        raise ValueError("windows of no tokens")
    for ids in (windows.input_ids, windows.decoder_input_ids, windows.labels[windows.labels != UNSCORED]):
        if ids is not None and ids.numel() and int(ids.min()) < 0:
            raise ValueError("windows of no tokens")
    return windows


def experts_of(tree: list[Any]) -> list[Tensor | None]:
    for routed in tree:
        if routed is not None:
            _check(routed, "experts", torch.bool, 1)
    return tree


def digests_of(tree: Mapping[str, Any]) -> dict[str, str]:
    for digest in (*tree, *tree.values()):
        if len(bytes.fromhex(digest)) != 16:
            raise ValueError("a digest that is not 128 bits")
    return dict(tree)


def tree_of_step(look: int, result: PassResult, record: TokenRecord | None) -> dict[str, Any]:
    arrays = {each.name: getattr(result, each.name) for each in fields(result)}
    named = {name: torch.from_numpy(array) for name, array in arrays.items() if isinstance(array, np.ndarray)}
    vectors = {name: torch.from_numpy(array) for name, array in result.vectors.items()}
    return {"look": look, "pass": {**named, "vectors": vectors}, "record": dict(vars(record)) if record else None}


def pass_of(tree: Mapping[str, Any], final: Windows) -> PassResult:
    """:raises ValueError: it is not a pass over these windows, or its numbers are not finite."""
    losses, tokens = tree["losses"], tree["tokens"]
    _check(losses, "losses", torch.float64, 1)
    _check(tokens, "tokens", torch.int64, 1)
    positions, vectors = tree.get("position_losses"), dict(tree["vectors"])
    if not len(losses) == len(tokens) <= len(final) or int(tokens.min()) < 0:
        raise ValueError("losses of other windows")
    if positions is not None:
        _check(positions, "position_losses", torch.float32, 2)
        if positions.shape != (len(losses), final.labels.shape[1]):
            raise ValueError("position_losses of other windows")
    transcripts = tree.get("transcripts")
    if transcripts is not None:
        _check(transcripts, "transcripts", torch.int64, 2)
    for name, rows in vectors.items():
        _check(rows, name, torch.float32, 2)
        if len(rows) != int(tokens.sum()):
            raise ValueError(f"{name} of other samples")
    return PassResult(
        losses.numpy(),
        tokens.numpy(),
        position_losses=None if positions is None else positions.numpy(),
        vectors={name: rows.numpy() for name, rows in vectors.items()},
        transcripts=None if transcripts is None else transcripts.numpy(),
    )


def record_of(tree: Mapping[str, Any] | None, tokens: Tensor) -> TokenRecord | None:
    if tree is None:
        return None
    record = TokenRecord(**tree)
    _check(record.tokens, "record.tokens", torch.int32, 2)
    _check(record.log_probs, "record.log_probs", torch.float32, 2)
    likely = record.log_probs.shape[1]
    if record.tokens.shape != record.log_probs.shape or len(record) != int(tokens.sum()):
        raise ValueError("a record of other tokens")
    if type(record.vocabulary) is not int or not 2 <= likely <= record.vocabulary:
        raise ValueError("a record of no vocabulary")
    if int(record.tokens.min()) < 0 or int(record.tokens.max()) >= record.vocabulary:
        raise ValueError("a record of unknown tokens")
    return record


def noise_of(tree: Mapping[str, Any]) -> NoiseRun:
    run = NoiseRun(**tree)
    figures = [run.figure, *(value for value in (run.kl_mean, run.flips) if value is not None)]
    if type(run.how) is not str or not all(type(value) is float and math.isfinite(value) for value in figures):
        raise ValueError("noise of no numbers")
    return run


def tree_of_sensitivities(known: BaselineFisher) -> dict[str, Any]:
    weights = {
        name: {"rows": _eighth(each.rows), "columns": _eighth(each.columns), "sum": float(each.rows.sum())}
        for name, each in (known.fisher or {}).items()
    }
    return {"weights": weights, "missing": known.missing}


def sensitivities_of(tree: Mapping[str, Any]) -> BaselineFisher:
    """:raises ValueError: rows and columns are not factors of a curvature."""
    fisher = {name: _curvature_of(each, name) for name, each in tree["weights"].items()}
    return BaselineFisher(fisher or None, str(tree["missing"]))


def _eighth(factors: Tensor) -> Tensor:
    """Factors in 8 bits: large ones are off by 6 % at most, and shares, which are sums of many, by far less."""
    return (factors * (LARGEST_OF_8_BITS / factors.max().clamp(min=TINY))).to(torch.float8_e4m3fn)


def _curvature_of(tree: Mapping[str, Any], name: str) -> Curvature:
    for part in ("rows", "columns"):
        if tree[part].dtype != torch.float8_e4m3fn:
            raise ValueError(f"{name} is {tree[part].dtype}")
    rows, columns = (tree[part].float() for part in ("rows", "columns"))
    for part in (rows, columns):
        _check(part, name, torch.float32, rows.ndim)
    if type(tree["sum"]) is not float or not 0 <= tree["sum"] < math.inf or min(rows.min(), columns.min()) < 0:
        raise ValueError(f"{name} is not a curvature")
    return Curvature(
        rows * (tree["sum"] / rows.sum().clamp(min=TINY)), columns / columns.sum(-1, keepdim=True).clamp(min=TINY)
    )


def whole(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r:.20} is not a number of windows")
    return value


def _check(tensor: Tensor, name: str, dtype: torch.dtype, dimensions: int) -> None:
    """:raises ValueError: a tensor has another form, is empty, or holds NaN or infinity."""
    if tensor.dtype != dtype or tensor.ndim != dimensions or not tensor.numel():
        raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ValueError(f"{name} holds NaN or infinity")
