"""The adapter ``npz_folder``: what it loads, what it leaves to others, and runs that keep and restore."""

from pathlib import Path

import numpy as np
import pytest
import torch
from npz_folder.adapter import Bigram, Config, NpzFolderAdapter, save

from invarlock.core.errors import UsageError

CONFIG = "model: {id: tiny}\ndataset: {seq_len: 16, preview_n: 2, final_n: 4}\nguards: {order: [invariants]}\n"


@pytest.fixture
def model(invarlocker):
    """A model in the working folder."""
    torch.manual_seed(0)
    model = Bigram(Config(vocab_size=64, width=16, num_layers=2))
    save(model, Path("tiny"))
    Path("config.yaml").write_text(CONFIG)
    return model


def test_a_model_comes_back_as_it_was_saved(model):
    loaded = NpzFolderAdapter().load_model("tiny")
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in model.named_parameters())
    assert NpzFolderAdapter().describe(loaded)["n_layer"] == 2


def test_other_ids_are_left_to_other_adapters():
    assert NpzFolderAdapter().load_model("path/to/checkpoint") is None


def test_a_pickle_is_not_read(model):
    np.savez("tiny/weights.npz", weight=np.array([{"any": "object"}], dtype=object))
    with pytest.raises(UsageError, match="allow_pickle=False"):
        NpzFolderAdapter().load_model("tiny")


def test_what_does_not_fit_its_configuration_is_one_line(model, invarlocker):
    Path("tiny/npz.json").write_text('{"vocab_size": 32, "width": 16, "num_layers": 2}')
    done = invarlocker.run("run", "-c", "config.yaml", "--out", "out")
    assert done.code == 2
    assert "tiny does not hold what its npz.json says" in done.err
    assert done.err.count("\n") == 1


def test_it_is_found_and_its_models_are_judged(model, invarlocker):
    assert "npz_folder" in invarlocker.run("plugins", "adapters", "--only", "ready").out
    done = invarlocker.run("run", "-c", "config.yaml", "--out", "out")
    assert done.code == 0, done.err
    assert done.report["model"]["adapter"] == "npz_folder"
    assert done.report["model"]["description"]["width"] == 16
    assert len(done.report["edit"]["modules"]) == 4


def test_a_rejected_edit_is_undone(model, invarlocker):
    invarlocker.module(
        "never",
        "from invarlock import hookimpl\n"
        "@hookimpl\n"
        "def invarlock_validate(model): return {'passed': False, 'action': 'rollback', 'message': 'never'}\n",
    )
    done = invarlocker.run("run", "-c", "config.yaml", "-p", "never", "--set", "guards.order=[never]", "--out", "out")
    assert done.code == 1, done.err
    assert done.report["model"]["restored"] is True
