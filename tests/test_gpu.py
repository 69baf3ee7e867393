"""On a CUDA device: the same numbers as on the CPU. Run by ``pytest -m gpu``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_report

from invarlock.quantization import Plan, Scheme, fake_quantize_, quantize_model
from invarlock.testing import architectures
from plugins_builtin.guards.invariants import InvariantsGuard
from plugins_builtin.guards.spectral import SpectralGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "scheme", [Scheme(8), Scheme(4, group_size=32), Scheme(4, symmetric=False), Scheme(3, per_channel=False)]
)
def test_a_weight_is_rounded_to_the_same_bits(dtype: torch.dtype, scheme: Scheme) -> None:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    there = weight.cuda()
    fake_quantize_(weight, scheme)
    fake_quantize_(there, scheme)
    assert torch.equal(weight, there.cpu())


def test_devices_are_quantized_side_by_side() -> None:
    here, there = architectures.llama(), architectures.llama()
    there.model.layers[0].cuda()
    plan = Plan(4, scope="all")
    assert {weight.device for weight in quantize_model(there, plan)} == {"cpu", "cuda:0"}
    quantize_model(here, plan)
    for name, parameter in here.named_parameters():
        assert torch.equal(parameter, there.get_parameter(name).cpu())


@pytest.mark.parametrize("guard", [InvariantsGuard, SpectralGuard])
@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:0", "cuda:1")], ids=" and ".join)
def test_guards_look_at_devices_side_by_side(guard: type, devices: tuple[str, str]) -> None:
    if torch.cuda.device_count() < sum(device.startswith("cuda") for device in devices):
        pytest.skip("there is one CUDA device")
    said = []
    for first, second in (("cuda:0", "cuda:0"), devices):
        model = architectures.llama().to(first)
        model.model.layers[0].to(second)
        asked = guard()
        asked.prepare(model, None, None, {})
        before = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
        quantize_model(model, Plan(2, scope="all"))
        said.append(asked.validate(model, None, {"baseline_weights": before}))
    alone, together = said
    assert together["action"] == alone["action"]
    for key in ("suspects", "modules", "families"):
        assert len(together["metrics"].get(key, [])) == len(alone["metrics"].get(key, []))


def test_the_demo_runs_on_the_device(invarlock) -> None:
    done = invarlock("run", "--demo", "--device", "cuda", "--set", "edit.plan.bitwidth=2", "--out", "out")
    assert done.code == 1, done.err
    report = read_report(Path("out"))
    assert report["model"]["devices"] == ["cuda:0"]
    assert report["model"]["restored"] is True


def test_a_streamed_model_is_saved_with_the_bytes_of_the_cpu(invarlock, config) -> None:
    path = config(guards={}, output={"save_model": True})
    for device in ("cpu", "cuda"):
        done = invarlock("run", "-c", path, "--device", device, "--stream", "--out", device)
        assert done.code == 0, done.err
    saved = [(Path(device) / "model" / "model.safetensors").read_bytes() for device in ("cpu", "cuda")]
    assert saved[0] == saved[1]


def test_a_model_is_spread_over_the_devices_of_the_machine(invarlock) -> None:
    done = invarlock("run", "--demo", "--device", "balanced", "--out", "out")
    assert done.code == 0, done.err
    devices = {f"cuda:{number}" for number in range(torch.cuda.device_count())}
    assert set(read_report(Path("out"))["model"]["devices"]) <= devices


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices")
@pytest.mark.parametrize("parallel", ["windows", "tensor", "fully_sharded"])
def test_processes_with_a_device_each(parallel: str) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "invarlock"]
    arguments = ["run", "--demo", "-q", "--out", "out", "--set", f"model.parallel={parallel}"]
    done = subprocess.run([*launcher, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert read_report(Path("out"))["verdict"]["accepted"]
