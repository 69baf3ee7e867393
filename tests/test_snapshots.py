"""A model's exact state: told apart to the bit, and brought back to the bit, ties and structure included."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from invarlock.core.errors import InputError
from invarlock.models.fingerprint import Fingerprint
from invarlock.models.snapshot import Snapshot
from invarlock.plugins.classes import ModelAdapter
from invarlock.testing import architectures


class Adapter(ModelAdapter):
    """Keeps and restores as every adapter does that does not say otherwise."""

    def load_model(self, model_id, device="auto", **kwargs) -> None:
        """Load nothing."""


ADAPTER = Adapter()
BUILDERS = architectures.ARCHITECTURES.values()


def flip_one_bit(model: nn.Module) -> None:
    next(model.parameters()).data.view(torch.int32).view(-1)[3] ^= 1


def set_to_nan(model: nn.Module) -> None:
    [*model.parameters()][-1].data.fill_(float("nan"))


def swap_two_equal_shapes(model: nn.Module) -> None:
    seen: dict[torch.Size, torch.Tensor] = {}
    for parameter in model.parameters():
        other = seen.setdefault(parameter.shape, parameter)
        if other is not parameter and not torch.equal(other, parameter):
            kept = other.data.clone()
            other.data.copy_(parameter.data)
            parameter.data.copy_(kept)
            return
    raise AssertionError("no two parameters to swap")


def replace_storage(model: nn.Module) -> None:
    parameter = next(model.parameters())
    parameter.data = torch.zeros(1, dtype=torch.bfloat16)


def drop_a_parameter(model: nn.Module) -> None:
    module, name = next((m, n) for m in model.modules() for n in m._parameters)
    setattr(module, name, None)


def replace_a_module(model: nn.Module) -> None:
    name = next(n for n, m in model.named_modules() if m._parameters and n)
    setattr(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], nn.Linear(2, 2))


def change_a_buffer(model: nn.Module) -> None:
    model.register_buffer("new_buffer", torch.ones(3))


CHANGES = [
    flip_one_bit,
    set_to_nan,
    swap_two_equal_shapes,
    replace_storage,
    drop_a_parameter,
    replace_a_module,
    change_a_buffer,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("build", BUILDERS)
def test_every_change_is_seen_and_undone_bit_for_bit(build, change) -> None:
    model = build()
    before, snapshot = Fingerprint.of(model), Snapshot(model)
    change(model)
    assert Fingerprint.of(model) != before
    assert Fingerprint.of(model).digest != before.digest
    snapshot.restore(model)
    assert Fingerprint.of(model) == before
    assert Fingerprint.of(build()) == before


def test_a_tie_that_was_cut_is_tied_again() -> None:
    model = architectures.gpt2()
    before, snapshot = Fingerprint.of(model), Snapshot(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert Fingerprint.of(model).changed_since(before) == ["lm_head.weight"], "an exact copy is no tie"
    snapshot.restore(model)
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_come_back_too(dtype: torch.dtype) -> None:
    model = architectures.llama().to(dtype)
    before, snapshot = Fingerprint.of(model), Snapshot(model)
    model.float().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    snapshot.restore(model)
    assert Fingerprint.of(model) == before


@pytest.fixture
def little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that has no room for a second copy of any model."""
    (tmp_path / "memory.max").write_text("1024\n")
    (tmp_path / "memory.current").write_text("0\n")
    monkeypatch.setattr("invarlock.core.memory.CGROUP", tmp_path)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("build", BUILDERS)
def test_a_snapshot_without_memory_for_it_is_on_disk(build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = build()
    before, snapshot = Fingerprint.of(model), Snapshot(model)
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert {path.suffix for path in folder.iterdir() if path.name[0] != "."} == {".safetensors"}, "nothing is pickled"
    change_a_buffer(model)
    snapshot.restore(model)
    assert Fingerprint.of(model) == before
    name, weight = next(iter(build().named_parameters()))
    weights = snapshot.parameters()
    del snapshot
    assert torch.equal(weights[name], weight)
    del weights
    assert not folder.exists()


@pytest.mark.usefixtures("little_memory")
def test_the_files_that_a_model_came_from_are_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    architectures.gpt2().save_pretrained(tmp_path / "checkpoint")
    model = type(architectures.gpt2()).from_pretrained(tmp_path / "checkpoint").eval()
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(-0.0)
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    before, snapshot = Fingerprint.of(model), ADAPTER.snapshot(model)
    copies = [path.stat().st_size for path in (tmp_path / "copies").rglob("*.safetensors")]
    assert len(copies) == 1, "one tensor is not what the file holds: -0.0"
    set_to_nan(model)
    flip_one_bit(model)
    ADAPTER.restore(model, snapshot)
    assert Fingerprint.of(model) == before
    (tmp_path / "checkpoint" / "model.safetensors").touch()
    with pytest.raises(InputError, match="changed while it was read"):
        ADAPTER.restore(model, snapshot)


def test_a_copy_that_somebody_changes_is_no_longer_the_snapshot_s() -> None:
    model = architectures.llama()
    snapshot = Snapshot(model)
    weights = snapshot.parameters()
    weights["lm_head.weight"].zero_()
    assert torch.equal(weights["lm_head.weight"], model.lm_head.weight)
