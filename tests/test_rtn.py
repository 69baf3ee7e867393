"""RTN for one weight: against a reference in float64 that shares no code with it, and for a whole model."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from invarlock.core.errors import UsageError
from invarlock.core.progress import showing
from invarlock.quantization import Plan, Scheme, WeightLayout, Workspace, fake_quantize_, quantize_model
from invarlock.testing import architectures

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRANULARITIES = [{"per_channel": False}, {}, {"group_size": 16}]


def cast(numbers: np.ndarray | np.floating, dtype: torch.dtype) -> np.ndarray:
    """Numbers rounded to a dtype, as float64."""
    return torch.from_numpy(np.asarray(numbers, dtype=np.float32)).to(dtype).double().numpy()


def rounded(unit: np.ndarray, scheme: Scheme, dtype: torch.dtype) -> np.ndarray:
    """One unit that shares a scale, rounded in float64 but for the roundings that the scheme itself asks for."""
    lowest, highest = -(2 ** (scheme.bitwidth - 1)), 2 ** (scheme.bitwidth - 1) - 1
    if not unit.any():
        return unit
    if scheme.symmetric:
        scale, zero = cast(np.abs(unit).max() / ((highest - lowest) / 2), dtype), 0.0
    else:
        low, high = min(unit.min(), 0.0), max(unit.max(), 0.0)
        scale = cast(np.float32(high - low) / np.float32(highest - lowest), dtype)
        zero = np.clip(np.rint(lowest - (low / scale).astype(np.float32)), lowest, highest)
    # The arithmetic is float32: what it makes of a quotient right beside a half decides which way that goes.
    quotients = (unit / scale).astype(np.float32).astype(np.float64)
    codes = np.clip(np.rint((quotients + zero).astype(np.float32)), lowest, highest)
    return cast((codes - zero) * scale, dtype)


def reference(weight: Tensor, scheme: Scheme) -> Tensor:
    """A matrix (out, in) rounded unit by unit."""
    matrix = weight.double().numpy().copy()
    if scheme.clamp_ratio:
        low, high = np.quantile(matrix, [scheme.clamp_ratio / 2, 1 - scheme.clamp_ratio / 2])
        matrix = np.clip(matrix, np.float32(low), np.float32(high)).astype(np.float64)
    if not scheme.per_channel:
        result = rounded(matrix, scheme, weight.dtype)
    else:
        width = scheme.group_size or matrix.shape[1]
        result = np.concatenate(
            [
                np.stack([rounded(row[start : start + width], scheme, weight.dtype) for row in matrix])
                for start in range(0, matrix.shape[1], width)
            ],
            axis=1,
        )
    return torch.from_numpy(result).to(weight.dtype)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Weights with rows of very different size, some on one side of zero only."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * torch.logspace(-2, 0, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight[1] = weight[1].abs() + 0.01
    return weight.to(dtype)


def clone_and_quantize(weight: Tensor, scheme: Scheme, layout: WeightLayout = WeightLayout.OUT_IN) -> Tensor:
    result = weight.clone()
    fake_quantize_(result, scheme, layout=layout)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["tensor", "channel", "group"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bitwidth", range(2, 9))
def test_equals_the_reference(bitwidth: int, symmetric: bool, granularity: dict, dtype: torch.dtype) -> None:
    scheme = Scheme(bitwidth=bitwidth, symmetric=symmetric, **granularity)
    weight = random(12, 40, dtype=dtype)
    assert torch.equal(clone_and_quantize(weight, scheme), reference(weight, scheme))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "granularity", [{"per_channel": False}, {}, {"group_size": 8}], ids=["tensor", "channel", "group"]
)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_dtype", [None, torch.float16], ids=str)
def test_codes_scales_and_zero_points_make_the_rounded_weight(scale_dtype, symmetric, granularity, dtype) -> None:
    result = random(12, 40, dtype=dtype)
    scheme = Scheme(bitwidth=5, symmetric=symmetric, clamp_ratio=0.05, **granularity)
    parameters = fake_quantize_(result, scheme, scale_dtype=scale_dtype)
    codes = parameters.codes(result)
    assert parameters.scales.dtype == (scale_dtype or dtype)
    assert codes.dtype == torch.int8
    assert -16 <= codes.min() <= codes.max() <= 15
    units = codes.float().view(*parameters.scales.shape, -1)
    if parameters.zero_points is not None:
        units = units - parameters.zero_points.unsqueeze(-1)
    units = units * parameters.scales.float().unsqueeze(-1)
    assert (parameters.minimums is None) == (symmetric or scale_dtype is None)
    if parameters.minimums is not None:
        units = units + parameters.minimums.unsqueeze(-1)
    assert torch.equal(units.view(12, 40).to(dtype), result)


@pytest.mark.parametrize("granularity", [{"per_channel": False}, {}], ids=["tensor", "channel"])
def test_scales_of_finite_rows_do_not_know_of_the_others(granularity: dict) -> None:
    weight = random(6, 8)
    sound = weight[1:].clone()
    weight[0, 3] = math.nan
    scheme = Scheme(bitwidth=4, **granularity)
    scales = fake_quantize_(weight, scheme).scales
    expected = fake_quantize_(sound, scheme).scales
    assert torch.equal(scales[-len(expected) :], expected)


@pytest.mark.parametrize(("symmetric", "expected"), [(True, [2 / 3, -2 / 3, 0.0]), (False, [1.0, -0.5, 0.5])])
def test_two_bits_by_hand(symmetric: bool, expected: list[float]) -> None:
    # Symmetric: scale 1 / 1.5; 1.5 rounds to 2, is held at 1. Asymmetric: scale 0.5, zero -1; 1.5 - 1 rounds half to even.
    weight = torch.tensor([[1.0, -0.5, 0.25 if symmetric else 0.75]])
    fake_quantize_(weight, Scheme(bitwidth=2, symmetric=symmetric))
    assert weight.tolist() == [pytest.approx(expected)]


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize("bitwidth", [4, 8])
def test_equals_compressed_tensors(bitwidth: int, strategy: str, symmetric: bool) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    group = {"group_size": 8} if strategy == "group" else {}
    arguments = quantization.QuantizationArgs(num_bits=bitwidth, symmetric=symmetric, strategy=strategy, **group)
    weight = random(12, 40)
    units = {"tensor": weight.view(1, -1), "channel": weight, "group": weight.view(12, 5, 8)}[strategy]
    scale, zero = helpers.calculate_qparams(units.amin(-1), units.amax(-1), arguments)
    if strategy == "channel":
        scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    expected = forward.fake_quantize(weight, scale, zero, arguments)
    scheme = Scheme(bitwidth=bitwidth, symmetric=symmetric, per_channel=strategy != "tensor", **group)
    assert torch.equal(clone_and_quantize(weight, scheme), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["tensor", "channel", "group"])
def test_a_weight_of_many_blocks_equals_the_reference(granularity: dict, dtype: torch.dtype) -> None:
    scheme = Scheme(bitwidth=4, **granularity | ({"group_size": 1000} if "group_size" in granularity else {}))
    weight = random(2300, 2050, dtype=dtype)
    result = weight.clone()
    figures = fake_quantize_(result, scheme).effect
    assert torch.equal(result, reference(weight, scheme))
    error = (weight.double() - result.double()).norm() / weight.double().norm()
    assert figures.relative_error == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_zero_rows_and_groups_stay_zero(symmetric: bool, dtype: torch.dtype) -> None:
    weight = random(6, 40, dtype=dtype)
    weight[2], weight[4, 16:32] = 0, 0
    for granularity in GRANULARITIES:
        result = clone_and_quantize(weight, Scheme(symmetric=symmetric, **granularity))
        assert result[2].eq(0).all()
        assert result[4, 16:32].eq(0).all()
        assert result.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    "granularity", [*GRANULARITIES, {"clamp_ratio": 0.1}], ids=["tensor", "channel", "group", "clamp"]
)
def test_rows_that_are_not_finite_are_left_and_counted(granularity: dict, symmetric: bool, dtype: torch.dtype) -> None:
    scheme = Scheme(bitwidth=4, symmetric=symmetric, **granularity)
    weight = random(8, 40, dtype=dtype)
    weight[0, 3], weight[5, 39], weight[6, 1] = math.nan, math.inf, -math.inf
    result, sound = weight.clone(), weight[[1, 2, 3, 4, 7]]
    figures, alone = fake_quantize_(result, scheme).effect, fake_quantize_(sound, scheme).effect
    assert figures.non_finite_rows == 3
    bits = torch.int32 if dtype is torch.float32 else torch.int16
    assert torch.equal(result[[0, 5, 6]].view(bits), weight[[0, 5, 6]].view(bits))
    assert torch.equal(result[[1, 2, 3, 4, 7]], sound)
    assert figures.relative_error == pytest.approx(alone.relative_error, rel=1e-6)
    assert figures.clipped_share * 8 == pytest.approx(alone.clipped_share * 5)
    transposed = weight.T.contiguous()
    assert fake_quantize_(transposed, scheme, layout=WeightLayout.IN_OUT).effect.non_finite_rows == 3
    assert torch.equal(transposed.T[[1, 2, 3, 4, 7]], sound)


@pytest.mark.parametrize("clamp_ratio", [0.0, 0.2])
def test_a_weight_without_finite_rows_is_left_alone(clamp_ratio: float) -> None:
    weight = torch.full((3, 4), math.nan)
    figures = fake_quantize_(weight, Scheme(clamp_ratio=clamp_ratio)).effect
    assert weight.isnan().all()
    assert (figures.non_finite_rows, figures.relative_error, figures.sqnr_db) == (3, 0.0, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", [Scheme(bitwidth=b, symmetric=s) for b in (2, 5, 8) for s in (True, False)], ids=str)
def test_the_largest_and_smallest_numbers_of_a_dtype_neither_overflow_nor_vanish(
    scheme: Scheme, dtype: torch.dtype
) -> None:
    limits = torch.finfo(dtype)
    rows = [[limits.max, 0], [limits.max, limits.min], [limits.max / 3, limits.min], [limits.smallest_normal, 0]]
    weight = torch.tensor(rows, dtype=torch.float64).to(dtype)
    result = clone_and_quantize(weight, scheme)
    assert result.isfinite().all()
    assert torch.equal(result[:3].sign(), weight[:3].sign())
    # In float16 these are ordinary sizes for weights, and the scale is subnormal: it has to be kept.
    if dtype is torch.float16 and scheme.bitwidth == 8 and scheme.symmetric:
        assert result[3, 0] == pytest.approx(limits.smallest_normal, rel=0.01)


def test_zero_rows_survive_where_subnormal_numbers_are_flushed() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        assert clone_and_quantize(torch.zeros(2, 8), Scheme()).eq(0).all()
        assert clone_and_quantize(torch.zeros(2, 8, dtype=torch.bfloat16), Scheme(symmetric=False)).eq(0).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_number_moves_further_than_half_a_step(dtype: torch.dtype) -> None:
    weight = random(12, 40, dtype=dtype)
    for bitwidth, symmetric in itertools.product(range(2, 9), (True, False)):
        result = clone_and_quantize(weight, Scheme(bitwidth=bitwidth, symmetric=symmetric)).double()
        reach = (
            weight.double().abs().amax(1) * 2
            if symmetric
            else weight.amax(1).clamp(min=0).double() - weight.amin(1).clamp(max=0).double()
        )
        steps = (weight.double() - result).abs().amax(1) / (reach / (2**bitwidth - 1))
        # A rounded scale moves the ends of the grid: by up to half of the codes times half a unit of its last place.
        assert steps.max() < 0.5 + 2**bitwidth * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clamp_ratio", [0.01, 0.3, 0.5])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=["tensor", "channel", "group"])
def test_clamp_clips_to_quantiles_of_the_matrix(granularity: dict, clamp_ratio: float, dtype: torch.dtype) -> None:
    scheme = Scheme(bitwidth=4, clamp_ratio=clamp_ratio, **granularity)
    weight = random(12, 41, dtype=dtype)
    result = weight.clone()
    figures = fake_quantize_(result, scheme).effect
    assert torch.equal(result, reference(weight, scheme))
    low, high = np.quantile(weight.double().numpy(), [clamp_ratio / 2, 1 - clamp_ratio / 2])
    outside = (weight.double() < low) | (weight.double() > high)
    assert figures.clipped_share == outside.double().mean()
    # What is clipped is part of the error: it is measured against the weight as it was.
    assert figures.relative_error == pytest.approx(
        float((weight.double() - result.double()).norm() / weight.double().norm()), rel=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_clamp_takes_more_numbers_than_torch_quantile(dtype: torch.dtype) -> None:
    weight = torch.randn(4100, 4100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert weight.numel() > 2**24
    figures = fake_quantize_(weight, Scheme(clamp_ratio=0.1), measure=False).effect
    # 16-bit numbers come in steps: all those that equal a quantile stay.
    assert figures.clipped_share == pytest.approx(0.1, abs=1e-6 if dtype is torch.float32 else 2e-3)
    assert float(weight.abs().amax()) == pytest.approx(1.6449, rel=0.01)


def test_each_expert_has_quantiles_and_a_range_of_its_own() -> None:
    experts = torch.stack([random(6, 16, seed=0), 100 * random(6, 16, seed=1)])
    for scheme in (Scheme(clamp_ratio=0.2), Scheme(per_channel=False)):
        expected = torch.stack([clone_and_quantize(expert, scheme) for expert in experts])
        assert torch.equal(clone_and_quantize(experts, scheme), expected)


SCHEMES = [Scheme(bitwidth=4, **granularity) for granularity in GRANULARITIES] + [
    Scheme(bitwidth=4, symmetric=False, group_size=7)
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_output_axis_is_where_the_module_has_it(scheme: Scheme, dtype: torch.dtype) -> None:
    matrix = random(12, 40, dtype=dtype)
    expected = reference(matrix, scheme)

    linear = nn.Linear(40, 12, dtype=dtype)
    linear.weight.data.copy_(matrix)
    fake_quantize_(linear.weight, scheme)
    assert torch.equal(linear.weight, expected)
    assert linear.weight.requires_grad

    conv1d_of_gpt2 = Conv1D(12, 40).to(dtype)
    conv1d_of_gpt2.weight.data.copy_(matrix.T)
    fake_quantize_(conv1d_of_gpt2.weight, scheme, layout=WeightLayout.IN_OUT)
    assert torch.equal(conv1d_of_gpt2.weight, expected.T)

    conv1d = nn.Conv1d(10, 12, kernel_size=4, dtype=dtype)
    conv1d.weight.data.copy_(matrix.view(12, 10, 4))
    fake_quantize_(conv1d.weight, scheme, layout=WeightLayout.CONV)
    assert torch.equal(conv1d.weight.flatten(1), expected)

    for memory_format in (torch.contiguous_format, torch.channels_last):
        conv2d = nn.Conv2d(10, 12, kernel_size=2, dtype=dtype).to(memory_format=memory_format)
        conv2d.weight.data.copy_(matrix.view(12, 10, 2, 2))
        address = conv2d.weight.data_ptr()
        fake_quantize_(conv2d.weight, scheme, layout=WeightLayout.CONV)
        assert torch.equal(conv2d.weight.flatten(1), expected)
        assert conv2d.weight.data_ptr() == address
        assert conv2d.weight.is_contiguous(memory_format=memory_format)

    experts = torch.stack([matrix, random(12, 40, dtype=dtype, seed=1)])
    expected_experts = torch.stack([reference(expert, scheme) for expert in experts])
    assert torch.equal(clone_and_quantize(experts, scheme), expected_experts)
    transposed = clone_and_quantize(experts.mT.contiguous(), scheme, WeightLayout.IN_OUT)
    assert torch.equal(transposed, expected_experts.mT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_figures_are_those_of_what_is_in_the_weight(dtype: torch.dtype) -> None:
    weight = random(12, 40, dtype=dtype)
    result, silent = weight.clone(), weight.clone()
    figures = fake_quantize_(result, Scheme(bitwidth=6), workspace=Workspace()).effect
    signal, noise = weight.double().square().sum(), (weight.double() - result.double()).square().sum()
    assert figures.parameters == 480
    assert figures.relative_error == pytest.approx(float((noise / signal).sqrt()), rel=1e-5)
    assert figures.sqnr_db == pytest.approx(float(10 * (signal / noise).log10()), rel=1e-5)
    assert (figures.clipped_share, figures.non_finite_rows) == (0.0, 0)

    unmeasured = fake_quantize_(silent, Scheme(bitwidth=6), measure=False).effect
    assert torch.equal(silent, result)
    assert (unmeasured.relative_error, unmeasured.sqnr_db) == (None, None)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25, 1e30])
def test_figures_do_not_overflow_or_vanish_in_float32(size: float) -> None:
    weight = random(12, 40)
    usual, unusual = (
        fake_quantize_(weight.clone(), Scheme(bitwidth=6)).effect,
        fake_quantize_(weight * size, Scheme(bitwidth=6)).effect,
    )
    assert unusual.relative_error == pytest.approx(usual.relative_error, rel=1e-3)
    assert unusual.sqnr_db == pytest.approx(usual.sqnr_db, rel=1e-3)


def test_figures_of_zeros_and_of_nothing() -> None:
    figures = fake_quantize_(torch.zeros(3, 4), Scheme()).effect
    assert (figures.relative_error, figures.sqnr_db) == (0.0, None)
    assert fake_quantize_(torch.empty(0, 4), Scheme()).effect.parameters == 0


@pytest.mark.parametrize(
    ("weight", "said"),
    [
        (torch.empty(3, 4, device="meta"), "meta"),
        (torch.zeros(3, 4, dtype=torch.int8), "int8"),
        (torch.zeros(3, 4, dtype=torch.float64), "float64"),
        (torch.zeros(3), r"\(3,\)"),
    ],
)
def test_weights_that_cannot_be_quantized(weight: Tensor, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        fake_quantize_(weight, Scheme())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bitwidth": 1}, "`bitwidth` is 1; set a whole number from 2 to 8"),
        ({"bitwidth": 9}, "`bitwidth` is 9"),
        ({"bitwidth": 4.0}, "`bitwidth` is 4.0"),
        ({"bitwidth": True}, "`bitwidth` is True"),
        ({"group_size": 0}, "`group_size` is 0"),
        ({"group_size": 8, "per_channel": False}, "set per_channel to true or group_size to null"),
        ({"clamp_ratio": 0.9}, "`clamp_ratio` is 0.9; set a number from 0 to 0.5"),
        ({"clamp_ratio": -0.1}, "`clamp_ratio` is -0.1"),
        ({"clamp_ratio": math.nan}, "`clamp_ratio` is nan"),
        ({"clamp_ratio": "much"}, "`clamp_ratio` is 'much'"),
    ],
)
def test_a_scheme_that_cannot_be(values: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Scheme(**values)


def test_scheme_and_plan_import_no_torch() -> None:
    code = "import sys; from invarlock.quantization import Plan, Scheme; Plan(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_is_quantized_in_its_order_with_a_result_for_each_weight() -> None:
    model, untouched = architectures.llama(), architectures.llama()
    told: list[tuple[int, int]] = []
    plan = Plan(bitwidth=4)
    with showing(lambda *progress: told.append(progress)):
        results = quantize_model(model, plan)
    names = [f"model.layers.{layer}.mlp.{name}_proj" for layer in range(2) for name in ("gate", "up", "down")]
    assert [result.name for result in results] == names
    assert told == [(done, 6) for done in range(1, 7)]
    for name, before in untouched.state_dict().items():
        module = name.removesuffix(".weight")
        assert torch.equal(model.state_dict()[name], reference(before, plan) if module in names else before)
    first = results[0]
    assert (first.bits, first.device, first.role) == (4, "cpu", "ffn")
    assert first.parameters == 48 * 32
    assert 0 < first.relative_error < 0.2


@pytest.mark.parametrize("build", [architectures.mixtral, architectures.gpt_oss], ids=lambda build: build.__name__)
def test_fused_experts_get_a_scale_for_each_output(build: object) -> None:
    model, before = build(), build()
    quantize_model(model, Plan(bitwidth=3))
    experts, untouched = model.model.layers[0].mlp.experts, before.model.layers[0].mlp.experts
    transposed = build is architectures.gpt_oss
    for name in ("gate_up_proj", "down_proj"):
        for result, weight in zip(getattr(experts, name).detach(), getattr(untouched, name).detach(), strict=True):
            matrix = weight.T if transposed else weight
            expected = reference(matrix.contiguous(), Scheme(bitwidth=3))
            assert torch.equal(result, expected.T if transposed else expected)


class _Elsewhere(nn.Parameter):
    """A parameter that says that it is on another device, though its memory is here."""

    device = property(lambda self: torch.device("cpu", 1))


def test_devices_work_side_by_side_and_results_and_progress_keep_the_order() -> None:
    model = architectures.llama()
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = _Elsewhere(layer.mlp.up_proj.weight.detach())
    told: list[tuple[int, int]] = []
    told_by: set[int] = set()

    def shown(done: int, total: int) -> None:
        # The first device dawdles until the other one would have overtaken it.
        if done == 1:
            time.sleep(0.2)
        told.append((done, total))
        told_by.add(threading.get_ident())

    with showing(shown):
        results = quantize_model(model, Plan())
    assert told == [(done, 6) for done in range(1, 7)]
    assert len(told_by) == 2
    assert [result.device for result in results] == ["cpu", "cpu:1", "cpu"] * 2
    assert [result.name.rpartition(".")[2] for result in results] == ["gate_proj", "up_proj", "down_proj"] * 2
    alone = architectures.llama()
    quantize_model(alone, Plan())
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(model.state_dict().values(), alone.state_dict().values(), strict=True)
    )


def test_an_offloaded_weight_is_named_before_anything_changes() -> None:
    model, before = architectures.llama(), architectures.llama()
    model.model.layers[1].mlp.up_proj.to("meta")
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\.up_proj is offloaded or not loaded .*`exclude`"):
        quantize_model(model, Plan())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before.model.layers[0].mlp.up_proj.weight)
    quantize_model(model, Plan(exclude=("*.1.mlp.up_proj",)))
