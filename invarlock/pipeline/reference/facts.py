"""Facts that the figures of a baseline rest on: where all are the same, a reference stands in for its pass."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from invarlock import __version__
from invarlock.checkpoints.checksums import digest_of
from invarlock.config.schema import DatasetConfig
from invarlock.models.configuration import fields_of
from invarlock.models.state import ENCODING, tokenizer_digest
from invarlock.pipeline.reference.kept import Facts
from invarlock.pipeline.session import Baseline


def facts_of(baseline: Baseline, model: torch.nn.Module, weights: str) -> Facts:
    """Facts of a loaded baseline.

    :param weights: digest of its weights, the same on every device.
    """
    config = json.dumps(fields_of(getattr(model, "config", None)), sort_keys=True, default=str)
    return {
        "set of weights": weights,
        "class of the model": type(model).__name__,
        "configuration of the model": hashlib.sha256(config.encode()).hexdigest(),
        "code beside the weights": _code_digest(baseline),
        "tokenizer": tokenizer_digest(baseline.tokenizer, ENCODING) if baseline.tokenizer is not None else None,
        "task": baseline.task.name,
        "data type": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": ", ".join(sorted({_kind_of(parameter.device) for parameter in model.parameters()})),
        "version of torch": str(torch.__version__),
        "version of transformers": transformers.__version__,
        "version of invarlock": __version__,
        **_of_dataset(baseline.session.config.dataset),
    }


def _of_dataset(dataset: DatasetConfig) -> dict[str, Any]:
    """Keys of the dataset; of a file its content counts, and not its place."""
    facts = {f"dataset.{key}": value for key, value in asdict(dataset).items()}
    if dataset.path is not None and Path(dataset.path).is_file():
        facts["dataset.path"] = digest_of(Path(dataset.path))
    return facts


def _code_digest(baseline: Baseline) -> str | None:
    """Of all Python files beside the weights, where code of the checkpoint's own ran."""
    folder = Path(baseline.session.config.model.id)
    if not baseline.own_code or not folder.is_dir():
        return baseline.own_code
    digests = "".join(f"{digest_of(path)} {path.name}\n" for path in sorted(folder.glob("*.py")))
    return hashlib.sha256(digests.encode()).hexdigest()


def _kind_of(device: torch.device) -> str:
    """Class of a device: the same kind of processor orders its sums in the same way."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{device.type} ({name})"
