"""On a CUDA device: the same numbers as on the CPU. Run by ``pytest -m gpu``."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import interpreted_kernel
import pytest
import torch
from conftest import read_report
from packed_checkpoints import HOW, compressed, packed_as
from packed_checkpoints import SCHEMES as SCHEMES_OF_LIBRARY

from invarlock.checkpoints.packing.unpacked import UnpackedCheckpoint, open_checkpoint
from invarlock.datasets.generated import write_text
from invarlock.datasets.layout import WindowLayout, Windows
from invarlock.evaluation.passes import measure
from invarlock.models.fingerprint import Fingerprint
from invarlock.models.snapshot import Snapshot
from invarlock.quantization import Plan, Scheme, WeightLayout, fake_quantize_, quantize_model, rounding
from invarlock.testing import architectures
from plugins_builtin.guards.invariants import InvariantsGuard
from plugins_builtin.guards.spectral import SpectralGuard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


SCHEMES = [*interpreted_kernel.SCHEMES, Scheme(8, group_size=128), Scheme(3, per_channel=False)]


@pytest.mark.parametrize("triton", [True, False], ids=["Triton", "plain operations"])
@pytest.mark.parametrize("layout", [WeightLayout.OUT_IN, WeightLayout.IN_OUT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_is_rounded_to_the_same_bits(scheme, dtype, layout, triton, monkeypatch: pytest.MonkeyPatch) -> None:
    if not triton:
        monkeypatch.setattr(rounding, "takes_triton", lambda matrix: False)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for make in interpreted_kernel.WEIGHTS:
        weight = make(torch.randn(640, 960, generator=torch.Generator().manual_seed(0)).to(dtype))
        there = weight.cuda()
        here, done = (fake_quantize_(one, scheme, layout=layout) for one in (weight, there))
        assert bool(done.sums.of_device) == (triton and scheme.per_channel)
        assert torch.equal(weight.view(bits), there.cpu().view(bits)), make.__name__
        assert done.effect.relative_error == pytest.approx(here.effect.relative_error, rel=1e-5)
        assert done.effect.non_finite_rows == here.effect.non_finite_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [0, 7, 16])
def test_weights_of_one_shape_are_rounded_to_the_same_bits(dtype: torch.dtype, apart: int) -> None:
    """One launch rounds them, wherever they lie."""
    here = architectures.llama().to(dtype)
    there = architectures.llama().to("cuda", dtype)
    weight = there.get_parameter("model.layers.1.self_attn.o_proj.weight")
    weight.data = torch.cat([weight.new_zeros(apart), weight.detach().flatten()])[apart:].view_as(weight)
    for model in (here, there):
        quantize_model(model, Plan(4, group_size=16, scope="all"))
    for name, parameter in here.named_parameters():
        assert torch.equal(parameter, there.get_parameter(name).cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format_", ["fp8", "mxfp4", "nvfp4"])
def test_a_weight_is_rounded_to_the_same_floats(format_: str, dtype: torch.dtype) -> None:
    weight = torch.randn(640, 960, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3, 5] = math.nan
    there = weight.cuda()
    for one in (weight, there):
        fake_quantize_(one, Plan(format=format_))
    assert torch.equal(weight.nan_to_num(), there.cpu().nan_to_num())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scheme", ["fp8-block", "nvfp4", "mxfp4", "int4-asymmetric"])
def test_a_packed_weight_is_unpacked_to_the_same_numbers(scheme: str) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES_OF_LIBRARY[scheme]})
    _compare_devices()


@pytest.mark.parametrize("method", HOW)
def test_a_weight_in_words_is_unpacked_to_the_same_numbers(method: str) -> None:
    packed_as(method, Path("packed"))
    _compare_devices()


def _compare_devices() -> None:
    here, there = open_checkpoint(Path("packed")), open_checkpoint(Path("packed"))
    assert isinstance(there, UnpackedCheckpoint)
    there.device = torch.device("cuda")
    for name in there.packed:
        assert torch.equal(here[name], there[name].cpu()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_fingerprint_is_the_same_on_every_device(dtype: torch.dtype) -> None:
    model = architectures.llama().to(dtype)
    here = Fingerprint.of(model)
    assert Fingerprint.of(model.cuda()) == here


def test_a_snapshot_brings_a_model_back_on_its_device() -> None:
    model = architectures.llama().cuda()
    before, snapshot = Fingerprint.of(model), Snapshot(model)
    quantize_model(model, Plan(4, scope="all"))
    assert Fingerprint.of(model) != before
    snapshot.restore(model)
    assert Fingerprint.of(model) == before


def test_batches_that_do_not_fit_are_halved(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = architectures.llama().cuda()
    ids = torch.randint(model.config.vocab_size, (64, 64))
    windows = Windows(ids, torch.ones_like(ids), ids)
    expected = measure(model, windows[:4], windows[4:], task="causal").losses
    forward = model.forward

    def with_little_memory(**inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 8:
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        return forward(**inputs)

    monkeypatch.setattr(model, "forward", with_little_memory)
    found = measure(model, windows[:4], windows[4:], task="causal").losses
    assert found == pytest.approx(expected, rel=1e-4)
    assert caplog.records[-1].message.startswith("cuda:0 has no memory for ")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "opt"])
def test_a_model_writes_the_text_that_it_writes_on_the_cpu(architecture: str) -> None:
    """A model whose steps cannot be recorded as a CUDA graph writes it all the same."""
    model = architectures.tiny_model(architecture)
    layout = WindowLayout(24, special=(1, 2, 3))
    here = write_text(model, layout, 5, seed=0)
    assert torch.equal(write_text(model.cuda(), layout, 5, seed=0), here)


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


def judged(report: dict[str, Any]) -> list[Any]:
    """The verdict and each finding; figures in messages may differ in their last digits."""
    verdict = report["verdict"]
    findings = [(finding["source"], finding["action"], finding["failed"]) for finding in verdict["findings"]]
    return [verdict["accepted"], verdict["action"], *findings]


def suspects(report: dict[str, Any]) -> list[str]:
    return [suspect["module"] for suspect in report["verdict"]["suspects"]]


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_a_run_ends_as_on_the_cpu(invarlock, config, flags: list[str], bits: int) -> None:
    path = config(guards={}, output={"save_model": True}, edit={"plan": {"bitwidth": bits, "scope": "all"}})
    here, there = on_both(invarlock, path, *flags)
    assert judged(there) == judged(here)
    assert suspects(there) == suspects(here)
    windows = [report["metrics"]["windows"] for report in (here, there)]
    for side in ("baseline", "edited"):
        assert windows[1][side] == pytest.approx(windows[0][side], rel=1e-4)


# A masked model needs the mask of a tokenizer.
@pytest.mark.parametrize("architecture", sorted(architectures.ARCHITECTURES.keys() - {"bert"}))
def test_each_architecture_is_judged_as_on_the_cpu(invarlock, config, architecture: str) -> None:
    architectures.tiny_model(architecture).save_pretrained("tiny")
    dataset = {"seq_len": 24, "preview_n": 2, "final_n": 6}
    model = {"id": "tiny", "adapter": "hf_auto", "dtype": "float32"}
    path = config(model=model, dataset=dataset, guards={}, edit={"plan": {"bitwidth": 4, "scope": "all"}})
    here, there = on_both(invarlock, path)
    assert judged(there) == judged(here)
    assert there["model"]["fingerprint_after"] == here["model"]["fingerprint_after"]


def on_both(invarlock, path: Path, *flags: str) -> list[dict[str, Any]]:
    """Reports of a run on the CPU and on a CUDA device."""
    reports = []
    for device in ("cpu", "cuda"):
        done = invarlock("run", "-c", path, "--device", device, "--out", device, *flags)
        assert done.code in (0, 1), done.err
        assert "Warning" not in done.err
        reports.append(read_report(Path(device)))
    return reports


def test_a_model_that_is_balanced_over_devices_is_judged(invarlock, config) -> None:
    done = invarlock("run", "-c", config(), "--device", "balanced", "--out", "out")
    assert done.code == 0, done.err
    assert all(device.startswith("cuda") for device in read_report(Path("out"))["model"]["devices"])
