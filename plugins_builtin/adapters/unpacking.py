"""Checkpoints of codes and scales: unpacked by InvarLock where it knows the layout, else by the library that packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.api import InputError, one_line
from plugins_builtin.adapters.locating import read_config

if TYPE_CHECKING:
    from invarlock.api import UnpackedCheckpoint

PACKAGES = {"torchao": "torchao", "hqq": "hqq"}
"""Packages that transformers needs to unpack weights, by method, which is the name of the extra that brings one."""


def check_unpackable(model_id: str, options: Mapping[str, Any]) -> str:
    """The method that packed the weights, once it is known that it can be undone; empty where they are not packed.

    :raises InputError: the method is unknown, or needs a package that is missing.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    from invarlock.api import LAYOUTS, configuration_of, layout_of, method_of

    folder = Path(model_id)
    method = method_of(configuration_of(folder) if folder.is_dir() else read_config(model_id, options))
    known = method in LAYOUTS or any(name.startswith(method) for name in AUTO_QUANTIZATION_CONFIG_MAPPING)
    if not known:
        raise InputError(f"{model_id}: config.json: quantization_config: unknown method {method!r}")
    package = PACKAGES.get(method)
    if package and find_spec(package) is None and not (folder.is_dir() and layout_of(folder)):
        todo = f"pip install 'invarlock[{method}]', which brings {package}"
        raise InputError(f"{model_id}: its weights are packed by {method}; to unpack them: {todo}")
    return method


def packing_left_out(config: Any) -> Any:
    """A configuration as it is for the weights that codes stand for."""
    for name in ("quantization_config", "quantization"):
        if hasattr(config, name):
            delattr(config, name)
    return config


class UnpackingLoader:
    """A model's class whose ``from_pretrained`` gets weights from an unpacked checkpoint, tensor by tensor."""

    def __init__(self, build: Callable[[], Any], config: Any, checkpoint: UnpackedCheckpoint) -> None:
        import torch

        self._config, self._checkpoint = config, checkpoint
        with torch.device("meta"):
            self._class = type(build())

    def from_pretrained(self, model_id: str, **options: Any) -> tuple[Any, Any]:
        """As that of transformers, with ``output_loading_info``."""
        model, loading = self._class.from_pretrained(None, config=self._config, state_dict=self._weights(), **options)
        model.name_or_path = model.config.name_or_path = str(self._checkpoint.folder)
        add_generation_config(model, self._checkpoint.folder)
        return model, loading

    def _weights(self) -> dict[str, Any]:
        import torch

        from invarlock.api import LazyTensor

        checkpoint, host = self._checkpoint, torch.device("cpu")
        return {
            name: LazyTensor(entry.shape, entry.dtype, host, lambda name=name: checkpoint[name])  # type: ignore[misc]
            for name, entry in checkpoint.entries.items()
        }


def add_generation_config(model: Any, folder: Any) -> None:
    """Read the generation configuration of a model that was not loaded from its folder by transformers."""
    import transformers

    if getattr(model, "generation_config", None) and (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder, trust_remote_code=False)


def unpacked(model: Any, model_id: str) -> Any:
    """A loaded model with dequantized weights and no quantization config, so that it can be moved, edited and saved."""
    from torch import Tensor
    from torch.nn import Parameter

    if getattr(model.config, "quantization_config", None) is None:
        return model
    method = model.config.quantization_config.quant_method
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        try:
            model = model.dequantize()
        except (NotImplementedError, AttributeError, RuntimeError) as error:
            raise InputError(f"{model_id}: weights packed by {method} cannot be unpacked: {one_line(error)}") from error
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            # Torchao's codes call themselves floating-point weights.
            if hasattr(type(parameter.data), "dequantize") and type(parameter.data) not in (Tensor, Parameter):
                setattr(module, name, Parameter(parameter.data.dequantize(), requires_grad=False))
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    return model
