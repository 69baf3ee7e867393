"""Models in a GGUF file, read by transformers: the weights are dequantized while loading."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.api import (
    InputError,
    ModelAdapter,
    NotStreamedError,
    check_file,
    complaints_of,
    hookimpl,
    panics_unprinted,
)
from plugins_builtin.adapters.hf import load_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

LAYER = re.compile(r"\bblk\.\d+\.")
"""Prefix of a layer's tensor names."""
SIZES = (".embedding_length", ".feed_forward_length", ".attention.head_count")


class HF_GGUF_Adapter(ModelAdapter):
    """Causal language models in a ``.gguf`` file, with their tokenizer."""

    name = "hf_gguf"
    requires = ("gguf",)

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        """Load a model.

        :param kwargs: ``dtype``; auto is float32, since the file need not hold an unquantized type.
        :raises InputError: the file does not exist or cannot be read.
        """
        from transformers import AutoModelForCausalLM

        path = Path(model_id)
        check_file(path)
        if kwargs.get("stream"):
            raise NotStreamedError(f"{model_id}: a GGUF file cannot be streamed")
        with complaints_of(f"{model_id}: cannot be loaded"), _parsed_once():
            _check_stated(path)
            dtype = "float32" if kwargs.get("dtype", "auto") == "auto" else kwargs["dtype"]
            # What lies beside the file may name code.
            model = load_checkpoint(
                AutoModelForCausalLM,
                str(path.parent),
                device,
                gguf_file=path.name,
                dtype=dtype,
                trust_remote_code=bool(kwargs.get("trust_remote_code")),
            )
            if not all(map(_is_finite, model.parameters())):
                _check_scales(path)
            return model

    def load_tokenizer(self, model_id: str, **kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        path, trust = Path(model_id), bool(kwargs.get("trust_remote_code"))
        with panics_unprinted(), complaints_of(f"{model_id}: no usable tokenizer in the file"), _parsed_once():
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, trust_remote_code=trust)

    @hookimpl
    def invarlock_load_model(self, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        return super().invarlock_load_model(model_id, device, options) if model_id.endswith(".gguf") else None


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let all steps of transformers in the block share what they parse: each asks ``gguf`` for it anew.

    Metadata of 50,000 tokens takes seconds to parse, and the table of names is asked for once a module.
    """
    import gguf
    import numpy as np

    class PlainReader(gguf.GGUFReader):  # type: ignore[misc]
        """A reader of plain arrays: slices of ``numpy.memmap`` take several times as long."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    kept = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    read = cache(PlainReader)
    # One file, as a string or as a path.
    gguf.GGUFReader = lambda path: read(os.fspath(path))
    gguf.get_tensor_name_map = cache(kept["get_tensor_name_map"])
    try:
        yield
    finally:
        vars(gguf).update(kept)


def _is_finite(tensor: Tensor) -> bool:
    """The extremes tell in a tenth of the time of all numbers."""
    lowest, highest = map(float, tensor.detach().aminmax())
    return math.isfinite(lowest) and math.isfinite(highest)


def _check_scales(path: Path) -> None:
    """Refuse a tensor in blocks whose numbers are not finite: codes are, so that a scale is not."""
    import gguf
    import numpy as np

    for tensor in gguf.GGUFReader(path).tensors:
        in_blocks = gguf.GGML_QUANT_SIZES[tensor.tensor_type][0] > 1
        if in_blocks and not np.isfinite(gguf.dequantize(tensor.data, tensor.tensor_type)).all():
            raise InputError(f"{path}: {tensor.name} holds scales that are not finite")


def _check_stated(path: Path) -> None:
    """Check that metadata counts no more layers than are stored, and has no size of 0, before any layer is built."""
    import gguf

    reader = gguf.GGUFReader(path)
    layers = {found[0] for tensor in reader.tensors if (found := LAYER.search(tensor.name))}
    for name, stated in reader.fields.items():
        if name.endswith(SIZES) and not stated.contents():
            raise InputError(f"{path}: {name} is 0")
        if name.endswith(".block_count") and not 0 < stated.contents() <= len(layers):
            raise InputError(f"{path}: {name} is {stated.contents()}, but {len(layers)} layers are stored")
