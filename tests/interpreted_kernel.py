"""Run by ``test_fused.py`` with TRITON_INTERPRET=1, which Triton reads when it is imported: prints what differs, as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from itertools import product

import torch
from torch import Tensor

from invarlock.models.digest import BLOCK, block_sums
from invarlock.quantization import Plan, Scheme, WeightLayout, fake_quantize_, quantize_model
from invarlock.quantization.rounding import RoundedWeight
from invarlock.testing import architectures

SCHEMES = [
    Scheme(8),
    Scheme(4, group_size=32),
    Scheme(4, symmetric=False),
    Scheme(2, symmetric=False, group_size=24),
    Scheme(4, clamp_ratio=0.05),
]
DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
PLAN = Plan(4, group_size=16, symmetric=False, scope="attn")
SHAPES = [(5, 100), (2, 4, 33)]
TO_SUM = [torch.arange(-7.0, 84.0).view(7, 13), torch.ones(9).bfloat16()[1:], torch.arange(2.0 * BLOCK + 5)]


def normal(weight: Tensor) -> Tensor:
    return weight


def tiny(weight: Tensor) -> Tensor:
    """Subnormal numbers, and minus zero."""
    return (weight.double() * torch.finfo(weight.dtype).smallest_normal).to(weight.dtype)


def huge(weight: Tensor) -> Tensor:
    largest = torch.finfo(weight.dtype).max
    return (weight.double() * largest).clamp(-largest, largest).to(weight.dtype)


def zero(weight: Tensor) -> Tensor:
    return torch.zeros_like(weight)


def positive(weight: Tensor) -> Tensor:
    return weight.abs() + 1


def not_finite(weight: Tensor) -> Tensor:
    weight[..., 1, 3], weight[..., 2, 0] = math.nan, math.inf
    return weight


def transposed(weight: Tensor) -> Tensor:
    """In the order in which a Conv1D stores it."""
    return weight.mT.contiguous().mT


WEIGHTS: list[Callable[[Tensor], Tensor]] = [normal, tiny, huge, zero, positive, not_finite, transposed]


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[str]] = {}
    for make, dtype in product(WEIGHTS, DTYPES):
        cases = product(SCHEMES, SHAPES)
        found[f"{make.__name__} {dtype}"] = [
            f"{scheme} {shape}: {difference}"
            for scheme, shape in cases
            for difference in differences(make(torch.randn(shape, generator=generator).to(dtype)), scheme)
        ]
    convolution = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    found["convolution"] = [*differences(convolution, Scheme(4), WeightLayout.CONV)]
    found["models"] = [f"{name} has other {difference}" for name, difference in differences_of_models(torch.bfloat16)]
    found["too long"] = [f"{weight.shape}" for weight in (torch.randn(1, (1 << 16) + 1),) if uses_kernel(weight)]
    found["sums"] = [f"{tensor.shape}" for tensor in TO_SUM if not torch.equal(*sums_of(tensor))]
    print(json.dumps(found))


def sums_of(tensor: Tensor) -> list[Tensor]:
    """Sums for a digest by plain operations, and by the kernel."""
    found = []
    for interpreted in ("0", "1"):
        os.environ["TRITON_INTERPRET"] = interpreted
        found.append(block_sums(tensor))
    return found


def differences(weight: Tensor, scheme: Scheme, layout: WeightLayout = WeightLayout.OUT_IN) -> Iterator[str]:
    plain, kernel = (weight.clone(memory_format=torch.preserve_format) for _ in range(2))
    os.environ["TRITON_INTERPRET"] = "0"
    expected = fake_quantize_(plain, scheme, layout=layout)
    os.environ["TRITON_INTERPRET"] = "1"
    rounded = fake_quantize_(kernel, scheme, layout=layout)
    if not rounded.sums.of_device:
        yield "the kernel was not used"
    bits = DTYPES[weight.dtype]
    if not torch.equal(plain.view(bits), kernel.view(bits)):
        yield "other bits"
    before, after = expected.effect, rounded.effect
    if abs(before.relative_error - after.relative_error) > 1e-5 * before.relative_error:
        yield f"relative error {before.relative_error} and {after.relative_error}"
    if (before.clipped_share, before.non_finite_rows) != (after.clipped_share, after.non_finite_rows):
        yield "clipped share, or rows that are not finite"
    if weight.isfinite().all() and not torch.equal(expected.scales, rounded.scales):
        yield "other scales"
    if weight.isfinite().all() and not scheme.symmetric and not torch.equal(expected.zero_points, rounded.zero_points):
        yield "other zero points"


def differences_of_models(dtype: torch.dtype) -> Iterator[tuple[str, str]]:
    """Of models whose alike weights are rounded by one launch, one of them in an odd place of memory."""
    models = []
    for interpreted in ("0", "1"):
        os.environ["TRITON_INTERPRET"] = interpreted
        torch.manual_seed(0)
        model = architectures.llama().to(dtype)
        odd = model.get_submodule("model.layers.1.self_attn.o_proj")
        odd.weight.data = torch.cat([torch.zeros(7, dtype=dtype), odd.weight.data.flatten()])[7:].view_as(odd.weight)
        parameters: dict[str, RoundedWeight | None] = {}
        models.append((model, quantize_model(model, PLAN, parameters=parameters), parameters))
    (plain, expected, grids), (kernel, found, grids_of_kernel) = models
    for name, parameter in plain.named_parameters():
        if not torch.equal(parameter.view(DTYPES[dtype]), kernel.get_parameter(name).view(DTYPES[dtype])):
            yield name, "bits"
    for before, after in zip(expected, found, strict=True):
        if before.name != after.name or abs(before.relative_error - after.relative_error) > 1e-5:
            yield after.name, "figures"
    for name, grid in grids.items():
        if not torch.equal(grid.scales, grids_of_kernel[name].scales):
            yield name, "scales"


def uses_kernel(weight: Tensor) -> bool:
    return bool(fake_quantize_(weight, Scheme(8)).sums.of_device)


if __name__ == "__main__":
    main()
