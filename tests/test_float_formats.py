"""FP8, MXFP4 and NVFP4 as formats of a plan: the arithmetic, what is refused, and the saved model."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import read_report, slow
from test_export import checkpoint, guarded, largest_difference
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from invarlock.quantization import Plan, fake_quantize_
from invarlock.quantization.scheme import PlanError
from invarlock.testing import architectures

# Of compressed-tensors, on import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

FORMATS = ["fp8", "mxfp4", "nvfp4"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.array(
    [(mantissa / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7) for exponent in range(16) for mantissa in range(8)]
)[:-1]
"""By the definitions of the formats; the last code of E4M3 is NaN."""


def to_nearest(numbers: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The nearest of the known numbers; of two as near the one whose code is even."""
    distances = np.abs(np.abs(numbers)[..., None] - known)
    ties = distances == distances.min(-1, keepdims=True)
    even_first = np.where(ties, np.arange(len(known)) % 2, 2)
    return np.copysign(known[even_first.argmin(-1)], numbers)


def cast(numbers: Any, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(np.asarray(numbers, dtype=np.float32)).to(dtype).double().numpy()


def reference(weight: Tensor, format_: str, *, per_channel: bool = True) -> Tensor:
    """A matrix rounded in float64, but for quotients and products, which are float32."""
    matrix = weight.double().numpy()
    single = matrix.astype(np.float32)
    if format_ == "fp8":
        largest = np.abs(single).max(1, keepdims=True) if per_channel else np.abs(single).max()
        scale = np.maximum(cast(largest / np.float32(448), weight.dtype), torch.finfo(torch.float32).smallest_normal)
        rounded = to_nearest((single / scale.astype(np.float32)).clip(-448, 448), E4M3) * scale
        return torch.from_numpy(cast(rounded, weight.dtype)).to(weight.dtype)
    blocks = single.reshape(len(single), -1, 32 if format_ == "mxfp4" else 16)
    largest = np.abs(blocks).max(-1, keepdims=True)
    if format_ == "mxfp4":
        exponents = np.vectorize(lambda number: math.frexp(number)[1] - 1 if number else 0)(largest)
        scale = 2.0 ** (exponents - 2)
        rounded = to_nearest((blocks / scale).clip(-6, 6), E2M1) * scale
    else:
        factor = np.float32(448 * 6) / np.abs(single).max()
        stored = to_nearest((largest / np.float32(6) * factor).clip(2.0**-9, 448), E4M3)
        scale = stored.astype(np.float32) / factor
        rounded = to_nearest((blocks / scale).clip(-6, 6), E2M1).astype(np.float32) * scale
        rounded = cast(rounded, torch.bfloat16)
    return torch.from_numpy(cast(rounded.reshape(matrix.shape), weight.dtype)).to(weight.dtype)


def random(dtype: torch.dtype, rows: int = 48, columns: int = 96) -> Tensor:
    """Rows of very different size, one of zeros, and a block of zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 1, rows).view(-1, 1)
    weight[3], weight[5, :32] = 0, 0
    return weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format_", FORMATS)
def test_rounding_is_that_of_the_format(format_: str, dtype: torch.dtype) -> None:
    weight = random(dtype)
    expected = reference(weight, format_)
    result = fake_quantize_(weight, Plan(format=format_)).effect
    assert torch.equal(weight, expected)
    assert result.relative_error < {"fp8": 0.04, "mxfp4": 0.16, "nvfp4": 0.12}[format_]


def test_fp8_can_have_one_scale_for_the_tensor() -> None:
    weight = random(torch.float32)
    expected = reference(weight, "fp8", per_channel=False)
    fake_quantize_(weight, Plan(format="fp8", per_channel=False))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("format_", FORMATS)
def test_every_number_of_a_format_stays_what_it_is(format_: str) -> None:
    known = E4M3 if format_ == "fp8" else np.resize(E2M1, 32)
    weight = torch.from_numpy(np.stack([known, -known])).float()
    expected = weight.clone()
    fake_quantize_(weight, Plan(format=format_))
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("format_", FORMATS)
def test_a_row_that_is_not_finite_is_left_and_the_others_do_not_feel_it(format_: str) -> None:
    alone, weight = random(torch.float32)[1:], random(torch.float32)
    weight[0, 7] = math.nan
    kept = weight[0].clone()
    result = fake_quantize_(weight, Plan(format=format_)).effect
    fake_quantize_(alone, Plan(format=format_))
    assert result.non_finite_rows == 1
    assert torch.equal(weight[0, :7], kept[:7])
    assert torch.equal(weight[1:], alone)


@pytest.mark.parametrize("format_", FORMATS)
def test_many_rows_are_rounded_as_a_few_are(format_: str) -> None:
    """A matrix of more than a block of memory."""
    few = random(torch.bfloat16, rows=8)
    many = few.repeat(400, 1)
    fake_quantize_(few, Plan(format=format_))
    fake_quantize_(many, Plan(format=format_))
    assert torch.equal(many, few.repeat(400, 1))


@pytest.mark.parametrize(
    ("plan", "key"),
    [
        ({"format": "fp8", "bitwidth": 4}, "bitwidth"),
        ({"format": "fp8", "group_size": 64}, "group_size"),
        ({"format": "fp8", "symmetric": False}, "symmetric"),
        ({"format": "mxfp4", "bitwidth": 8}, "bitwidth"),
        ({"format": "mxfp4", "group_size": 16}, "group_size"),
        ({"format": "mxfp4", "per_channel": False}, "per_channel"),
        ({"format": "nvfp4", "group_size": 32}, "group_size"),
        ({"format": "nvfp4", "symmetric": False}, "symmetric"),
        ({"format": "fp9"}, "format"),
    ],
)
def test_what_contradicts_a_format_is_refused_with_its_key(invarlock, config, plan: dict[str, Any], key: str) -> None:
    done = invarlock("run", "-c", config(edit={"plan": plan}), "--out", "out")
    assert done.code == 2
    assert f"edit.plan.{key}" in done.err
    assert done.err.count("\n") == 1
    if key != "format":
        with pytest.raises(PlanError, match=f"^`{key}` is"):
            Plan(**plan)


def test_a_format_brings_its_own_bits_and_blocks() -> None:
    plans = [Plan(format=format_) for format_ in ("int", *FORMATS)]
    assert [(plan.bitwidth, plan.group_size) for plan in plans] == [(8, None), (8, None), (4, 32), (4, 16)]


SAVED = [("fp8", {}), ("fp8", {"per_channel": False}), ("mxfp4", {}), ("nvfp4", {})]


@pytest.mark.parametrize(
    ("dtype", "format_", "plan"),
    [
        *(("bfloat16", *each) for each in SAVED),
        *slow(*((dtype, *each) for dtype, each in itertools.product(["float32", "float16"], SAVED))),
    ],
)
def test_saved_logits_are_the_guarded_models(config, dtype: str, format_: str, plan: Any) -> None:
    folder = checkpoint(architectures.llama, dtype, intermediate_size=64)
    model = guarded(config, folder, "compressed-tensors", format=format_, **plan)
    described = AutoConfig.from_pretrained("out/model")
    described.quantization_config["dequantize"] = True
    assert largest_difference(model, AutoModelForCausalLM.from_pretrained("out/model", config=described)) == 0.0
    if format_ == "fp8" or dtype == "bfloat16":
        # Left packed, numbers of 4 bits are unpacked to bfloat16, whatever the model's dtype is.
        assert largest_difference(model, AutoModelForCausalLM.from_pretrained("out/model", dtype=dtype)) == 0.0


@pytest.mark.parametrize("format_", FORMATS)
def test_saved_logits_of_another_architecture(config, format_: str) -> None:
    model = guarded(config, checkpoint(architectures.opt, "bfloat16", ffn_dim=64), "compressed-tensors", format=format_)
    assert largest_difference(model, AutoModelForCausalLM.from_pretrained("out/model", dtype="bfloat16")) == 0.0


@pytest.mark.parametrize(("format_", "layout"), [("fp8", "float"), ("mxfp4", "mxfp4-pack"), ("nvfp4", "nvfp4-pack")])
def test_a_saved_model_says_what_it_is(config, format_: str, layout: str) -> None:
    folder = checkpoint(architectures.llama, "bfloat16", intermediate_size=64)
    guarded(config, folder, "compressed-tensors", format=format_)
    described = json.loads(Path("out/model/config.json").read_text())["quantization_config"]
    assert described["format"] == f"{layout}-quantized"
    assert described["config_groups"]["group_0"]["weights"]["type"] == "float"
    report = read_report(Path("out"))
    assert report["edit"]["plan"]["format"] == format_
    assert {module["bits"] for module in report["edit"]["modules"]} == {8 if format_ == "fp8" else 4}


def test_blocks_that_are_not_whole_are_refused(invarlock, config) -> None:
    path = config(
        model={"id": str(checkpoint(architectures.llama))},
        dataset={},
        edit={"plan": {"scope": "all", "format": "mxfp4"}},
        output={"save_model": True},
    )
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 2
    assert "edit.plan.group_size 32 does not divide the 48 inputs of model.layers.0.mlp.down_proj" in done.err


def test_a_streamed_run_saves_the_same(invarlock, config) -> None:
    folder = checkpoint(architectures.llama, "bfloat16", intermediate_size=64)
    model = guarded(config, folder, "compressed-tensors", format="nvfp4")
    done = invarlock("run", "--stream", "-c", "config.yaml", "--out", "streamed")
    assert done.code == 0, done.err
    loaded = AutoModelForCausalLM.from_pretrained("streamed/model", dtype="bfloat16")
    assert largest_difference(model, loaded) == 0.0
