"""Rounding of activations and of the key-value cache that a checkpoint declares, as passes simulate it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_report, slow
from packed_checkpoints import BASE, SCHEMES, changed, compressed, packed_as
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from invarlock.adapters import HF_Causal_Adapter
from invarlock.checkpoints.packing.activations import ActivationRounding, simulation_of
from invarlock.models.simulation import ACTIVATIONS, CACHE

# Of compressed-tensors, on import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

WINDOWS = ("--set", "dataset.seq_len=16", "--set", "dataset.preview_n=1", "--set", "dataset.final_n=4")
QUICK = ("--generated", "--set", "guards.order=[invariants]", "--out", "out", "--force", *WINDOWS)
FP8_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def compared(invarlock: Any, baseline: str = BASE, subject: str = "packed") -> Any:
    return invarlock("compare", "--baseline", baseline, "--subject", subject, *QUICK)


def told(part: str) -> str:
    """The gap of a part, in the report."""
    return next(gap["message"] for gap in read_report(Path("out"))["coverage"]["gaps"] if gap["part"] == part)


def scaled(scales: dict[str, float], **declared: Any) -> None:
    """Store scales by the end of their names, in place of those that there are, and declare more in the configuration."""
    path, config = Path("packed/model.safetensors"), Path("packed/config.json")
    tensors, settings = load_file(path), json.loads(config.read_text())
    for name, value in scales.items():
        of_cache = (
            [name]
            if name.startswith("model.")
            else [f"model.layers.{layer}.self_attn.{name}" for layer in range(settings["num_hidden_layers"])]
        )
        found = [stored for stored in tensors if stored.endswith(f".{name}")]
        tensors |= {stored: torch.tensor([float(value)]) for stored in found or of_cache}
    save_file(tensors, path, {"format": "pt"})
    settings["quantization_config"] |= declared
    config.write_text(json.dumps(settings))


@pytest.mark.parametrize("scheme", ["fp8-static-activations", "int8-activations", *slow("fp8-dynamic-activations")])
def test_logits_are_those_of_the_library_that_rounds_activations(scheme: str) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES[scheme]}, torch.float32)
    model, theirs = HF_Causal_Adapter().load_model("packed", "cpu"), AutoModelForCausalLM.from_pretrained("packed")
    ids = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, wanted = model(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits
        with simulation_of(model, Path("packed")).running(model):
            found = model(input_ids=ids).logits
        after = model(input_ids=ids).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(plain, wanted)
    assert torch.equal(after, plain)


@pytest.mark.parametrize(("scale", "code"), [(0.05, 0), (1e-6, 1)])
def test_scales_of_activations_are_judged(invarlock, scale: float, code: int) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-static-activations"]})
    scaled({"input_scale": scale})
    done = compared(invarlock)
    assert done.code == code, done.out
    assert "simulated (FP8 (E4M3), per tensor, static, of the inputs of 14 layers)" in told(ACTIVATIONS)
    reasons = str(read_report(Path("out"))["verdict"]["reasons"])
    assert "invariants" not in reasons
    assert ("primary metric" in reasons) == bool(code)


@pytest.mark.parametrize(("scale", "code"), [(1e-7, 1), *slow((0.05, 0))])
def test_scales_of_the_cache_are_judged(invarlock, scale: float, code: int) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-channel"]})
    scaled({"k_scale": scale, "v_scale": scale}, kv_cache_scheme=FP8_CACHE)
    assert compared(invarlock).code == code
    assert "simulated (FP8 (E4M3), per tensor, static, of 2 layers)" in told(CACHE)


def test_both_sides_run_as_they_are_served(invarlock) -> None:
    """The unedited checkpoint is no change, activations and all."""
    compressed(Path("packed"), {"Linear": SCHEMES["nvfp4-activations"]})
    assert compared(invarlock, "packed").code == 0
    report = read_report(Path("out"))
    assert report["metrics"]["primary"]["ratio"] == 1
    assert report["verdict"]["reasons"] == []
    assert "simulated (NVFP4, blocks of 16, dynamic" in told(ACTIVATIONS)
    done = invarlock("verify", "out", "--baseline", "packed", "--subject", "packed")
    assert done.code == 0, done.out
    assert "checked      losses of the edited model, measured again" in done.out


def test_a_run_rounds_no_activations_nor_does_its_verification(invarlock, config) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["int8-activations"]})
    small = {"provider": "generated", "seq_len": 16, "preview_n": 1, "final_n": 2}
    path = config(model={"id": "packed", "device": "cpu"}, dataset=small)
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 0, done.out
    assert "was not judged" in told(ACTIVATIONS)
    assert invarlock("verify", "out", "--baseline", "packed").code == 0


def test_modelopt_stores_scales_of_activations_and_of_the_cache(invarlock) -> None:
    packed_as("modelopt-fp8", Path("packed"))
    scaled({"k_proj.k_scale": 1, "v_proj.v_scale": 1}, kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert compared(invarlock).code == 0
    assert "simulated (FP8 (E4M3), per tensor, static, of the inputs of 7 layers)" in told(ACTIVATIONS)
    assert "simulated (FP8 (E4M3), per tensor, static, of 1 layers)" in told(CACHE)


def test_modelopt_rounds_activations_to_nvfp4() -> None:
    packed_as("modelopt-nvfp4", Path("packed"))
    described = simulation_of(HF_Causal_Adapter().load_model("packed", "cpu"), Path("packed")).described
    assert described == {ACTIVATIONS: "NVFP4, blocks of 16, dynamic, of the inputs of 7 layers"}


KINDS = {
    "per token": (
        "modelopt-fp8-block",
        {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        {},
        "FP8 (E4M3), per token, dynamic",
    ),
    "static": ("fp8", {"activation_scheme": "static"}, {"activation_scale": 0.05}, "FP8 (E4M3), per tensor, static"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_other_layouts(kind: str) -> None:
    method, declared, scales, words = KINDS[kind]
    packed_as(method, Path("packed"))
    stems = {name.rpartition(".")[0] for name in load_file("packed/model.safetensors") if name.endswith("proj.weight")}
    scaled({f"{stem}.{name}": value for stem in stems for name, value in scales.items()}, **declared)
    simulation = simulation_of(HF_Causal_Adapter().load_model("packed", "cpu"), Path("packed"))
    assert simulation.described == {ACTIVATIONS: f"{words}, of the inputs of 7 layers"}
    inputs = torch.randn(2, 3, 128, generator=torch.Generator().manual_seed(0))
    rounded = simulation.inputs["model.layers.0.self_attn.q_proj"](inputs)
    assert 0 < (rounded - inputs).norm() / inputs.norm() < 0.05


BY_TORCHAO: dict[str, tuple[Any, str]] = {
    "torchao-int4": ("int8_asym_per_token", "INT8, asymmetric, per token, dynamic"),
    "torchao-fp8": (
        {"_type": "QuantizeTensorToFloat8Kwargs", "_data": {"granularity": {"_type": "PerTensor", "_data": {}}}},
        "FP8 (E4M3), per tensor, dynamic",
    ),
}


@pytest.mark.parametrize("method", BY_TORCHAO)
def test_torchao_describes_activations_beside_each_weight(method: str) -> None:
    declared, words = BY_TORCHAO[method]
    packed_as(method, Path("packed"), activations=declared)
    simulation = simulation_of(HF_Causal_Adapter().load_model("packed", "cpu"), Path("packed"))
    assert simulation.described == {ACTIVATIONS: f"{words}, of the inputs of 7 layers"}


def test_activations_that_torchao_rounds_in_another_way_are_a_gap(invarlock) -> None:
    packed_as("torchao-int8", Path("packed"), activations={"_type": "QuantizeTensorToInt9Kwargs", "_data": {}})
    path = Path("packed/config.json")
    path.write_text(path.read_text().replace("Int8WeightOnlyConfig", "Int9DynamicActivationInt8WeightConfig"))
    assert compared(invarlock).code == 0
    assert "was not judged" in told(ACTIVATIONS)


ARGUMENTS: dict[str, dict[str, Any]] = {
    "MXFP4, blocks of 32": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "MXFP8, blocks of 32": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "INT8, asymmetric, per token": {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": False},
    "INT8, per tensor": {"num_bits": 8, "type": "int", "strategy": "tensor"},
    "FP8 (E4M3), blocks of 16": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16},
}  # fmt: skip


@pytest.mark.parametrize("words", ARGUMENTS)
def test_dynamic_rounding_is_near_the_inputs(words: str) -> None:
    from compressed_tensors.quantization import QuantizationArgs

    rounding = ActivationRounding(QuantizationArgs(**ARGUMENTS[words], dynamic=True))
    inputs = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounded = rounding(inputs)
    assert str(rounding) == f"{words}, dynamic"
    assert rounded.dtype == inputs.dtype
    assert 0 < (rounded - inputs).norm() / inputs.norm() < (0.2 if "MXFP4" in words else 0.05)


def test_fp8_in_blocks_rounds_activations_in_groups(invarlock) -> None:
    packed_as("fp8", Path("packed"))
    scaled({}, activation_scheme="dynamic")
    assert compared(invarlock).code == 0
    assert "simulated (FP8 (E4M3), blocks of 32, dynamic, of the inputs of 7 layers)" in told(ACTIVATIONS)


@pytest.mark.parametrize("name", ["v_scale", *slow("input_scale")])
def test_a_scale_of_zero_is_one_line(invarlock, name: str) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-static-activations"]})
    scaled({"k_scale": 1, "v_scale": 1} | {name: 0}, kv_cache_scheme=FP8_CACHE)
    done = compared(invarlock)
    assert done.code == 2
    assert f".{name} holds scales that are zero" in done.err.splitlines()[-1]


def test_a_scale_of_another_shape_is_one_line(invarlock) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-static-activations"]})
    changed(Path("packed"), ".input_scale", lambda scale: scale.expand(7))
    done = compared(invarlock)
    assert done.code == 2
    assert ".input_scale has shape (7,), and is a scale for a whole tensor" in done.err.splitlines()[-1]


def test_what_cannot_be_simulated_stays_a_gap(invarlock) -> None:
    """In all layers or in none: here one has no scale."""
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-static-activations"]})
    path = Path("packed/model.safetensors")
    tensors = load_file(path)
    del tensors["model.layers.0.mlp.up_proj.input_scale"]
    save_file(tensors, path, {"format": "pt"})
    assert compared(invarlock).code == 0
    assert "was not judged" in told(ACTIVATIONS)
