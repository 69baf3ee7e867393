"""The adapter ``npz_folder``: a folder with ``npz.json`` and ``weights.npz``, arrays of numpy that hold no pickle."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from invarlock.core.api import ModelAdapter
from invarlock.core.errors import UsageError

CONFIG, WEIGHTS = "npz.json", "weights.npz"


@dataclass(frozen=True)
class Config:
    """What ``npz.json`` holds. InvarLock reads ``vocab_size``."""

    vocab_size: int
    width: int
    num_layers: int


class MLP(nn.Module):
    """One layer. What is in a ``ModuleList`` and called MLP is a feed-forward weight to InvarLock."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden):
        return hidden + self.down(nn.functional.gelu(self.up(hidden)))


class Bigram(nn.Module):
    """A language model that looks at one token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(MLP(config.width) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.lm_head(hidden))


def save(model: Bigram, folder: Path) -> None:
    """Write a model to a new folder."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(asdict(model.config)))
    np.savez(folder / WEIGHTS, **{name: tensor.numpy() for name, tensor in model.state_dict().items()})


class NpzFolderAdapter(ModelAdapter):
    """Loads folders with ``npz.json`` in them."""

    name = "npz_folder"

    def load_model(self, model_id: str, device: str = "auto") -> Bigram | None:
        folder = Path(model_id)
        if not (folder / CONFIG).is_file():
            return None
        try:
            model = Bigram(Config(**json.loads((folder / CONFIG).read_text())))
            with np.load(folder / WEIGHTS, allow_pickle=False) as arrays:
                model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"model.id: {folder} does not hold what its {CONFIG} says: {error}") from error
        return model.to("cpu" if device == "auto" else device).eval()

    def describe(self, model: Bigram) -> dict[str, Any]:
        return {"model_type": "npz_folder", "n_layer": len(model.layers), **asdict(model.config)}

    def snapshot(self, model: Bigram) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def restore(self, model: Bigram, snapshot: dict[str, torch.Tensor]) -> None:
        model.load_state_dict(snapshot)
