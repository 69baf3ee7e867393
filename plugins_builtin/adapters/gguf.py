"""Models in a GGUF file, read by transformers: the weights are dequantized while loading."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invarlock import hookimpl
from invarlock.core.api import ModelAdapter
from invarlock.core.errors import UsageError, one_line
from plugins_builtin.adapters.hf import load_checkpoint


class HF_GGUF_Adapter(ModelAdapter):
    """Causal language models in a ``.gguf`` file, with their tokenizer."""

    name = "hf_gguf"
    requires = ("gguf",)

    def load_model(self, model_id: str, device: str = "auto", **kwargs: Any) -> Any:
        """Load a model.

        :param kwargs: ``dtype``; auto is float32, since the file need not hold an unquantized type.
        :raises UsageError: when the file is not there or cannot be read.
        """
        from transformers import AutoModelForCausalLM

        path = Path(model_id)
        if kwargs.get("stream"):
            raise UsageError(f"model.id: {model_id}: a GGUF file cannot be streamed")
        if not path.is_file():
            raise UsageError(f"model.id: {model_id}: there is no such GGUF file")
        dtype = "float32" if kwargs.get("dtype", "auto") == "auto" else kwargs["dtype"]
        return load_checkpoint(AutoModelForCausalLM, str(path.parent), device, gguf_file=path.name, dtype=dtype)

    def load_tokenizer(self, model_id: str, **kwargs: Any) -> Any:
        from transformers import AutoTokenizer

        path = Path(model_id)
        try:
            return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"model.id: {model_id}: the file holds no usable tokenizer: {one_line(error)}") from error

    @hookimpl
    def invarlock_load_model(self, model_id: str, device: str, options: Mapping[str, Any]) -> Any:
        return super().invarlock_load_model(model_id, device, options) if model_id.endswith(".gguf") else None
