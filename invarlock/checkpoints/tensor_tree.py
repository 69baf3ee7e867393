"""Plain data and tensors in one tree, kept as a folder of JSON and safetensors, with the digest of each file.

No pickles: what is read makes numbers, texts, lists, dicts and tensors, and no other object. Equal tensors are stored
once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from invarlock.checkpoints.checksums import SUMS, digest_of, listed
from invarlock.checkpoints.output_folder import staged_folder
from invarlock.checkpoints.soundness import read_json
from invarlock.core.errors import InputError, one_line
from invarlock.core.paths import absolute
from invarlock.models.digest import digest_of as tensor_digest
from invarlock.models.digest import octets_of

TENSORS = "tensors.safetensors"
SCALARS = (bool, int, str, type(None))


class UnstorableError(ValueError):
    """The value is not plain data; the message names its type."""


@dataclass
class _Packing:
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """By their digests."""

    def pack(self, value: Any) -> Any:
        """The value as JSON holds it: what JSON has no form for is an object of one key, its kind.

        :raises UnstorableError: it holds something else than plain data and tensors.
        """
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if kind is list:
            return [self.pack(entry) for entry in value]
        if kind is tuple:
            return {"tuple": [self.pack(entry) for entry in value]}
        if kind is dict and all(type(key) is str for key in value):
            return {"dict": {key: self.pack(entry) for key, entry in value.items()}}
        if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta:
            return {"tensor": [self._put(value.detach().cpu().contiguous()), str(value.device)]}
        raise UnstorableError(f"a {kind.__name__}, where plain data and tensors can be stored")

    def _put(self, tensor: Tensor) -> str:
        name = tensor_digest(f"{tensor.dtype} {tuple(tensor.shape)} ", octets_of(tensor))
        # A copy, for safetensors refuses views that share memory.
        if name not in self.tensors:
            self.tensors[name] = tensor.clone()
        return name


def storable(value: Any) -> None:
    """:raises UnstorableError: the value cannot be kept."""
    _Packing().pack(value)


def write(folder: Path, name: str, tree: Mapping[str, Any]) -> str:
    """Write a tree to a new folder, whole or not at all; returns its digest.

    :param name: of the JSON file.
    :raises UnstorableError: it holds something else than plain data and tensors.
    """
    packing = _Packing()
    text = json.dumps(packing.pack(dict(tree)), allow_nan=False)
    with staged_folder(folder) as staged:
        (staged / name).write_text(text, encoding="utf-8")
        safetensors.torch.save_file(packing.tensors, staged / TENSORS)
        sums = "".join(f"{digest_of(staged / file)}  {file}\n" for file in (name, TENSORS))
        (staged / SUMS).write_text(sums, encoding="utf-8")
        return digest_of(staged / SUMS)


def read(folder: Path, name: str) -> tuple[dict[str, Any], str]:
    """The tree of a folder, and its digest.

    :raises InputError: a file is missing, is not what its digest says, or does not hold a tree.
    """
    if missing := [file for file in (SUMS, name, TENSORS) if not (folder / file).is_file()]:
        raise InputError(f"{absolute(folder)} has no file {missing[0]}")
    try:
        known = listed(folder / SUMS)
        for file in (name, TENSORS):
            if known.get(file) != digest_of(folder / file):
                raise InputError(f"{absolute(folder / file)} does not match its digest in {SUMS}")
        tensors = safetensors.torch.load_file(folder / TENSORS)
        tree = _unpack(read_json(folder / name), tensors)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{absolute(folder)} is damaged: {one_line(error)}") from error
    if type(tree) is not dict:
        raise InputError(f"{absolute(folder / name)} holds no mapping")
    return tree, digest_of(folder / SUMS)


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(entry, tensors) for entry in value]
    if not isinstance(value, dict):
        return value
    ((kind, held),) = value.items()
    makers: dict[str, Callable[[], Any]] = {
        "float": lambda: float(held),
        "tuple": lambda: tuple(_unpack(entry, tensors) for entry in held),
        "dict": lambda: {key: _unpack(entry, tensors) for key, entry in held.items()},
        "tensor": lambda: _placed(tensors, *held),
    }
    return makers[kind]()


def _placed(tensors: Mapping[str, Tensor], name: str, device: str) -> Tensor:
    """A tensor on the device that it was on."""
    if torch.device(device).type == "meta":
        raise ValueError(f"tensor {name} is on no device")
    return tensors[name].to(device)
