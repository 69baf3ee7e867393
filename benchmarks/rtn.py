"""RTN against one pass over the same weights: ``python benchmarks/rtn.py``.

The weights have the shapes of the linear layers of SmolLM2-135M, float32, int8 per channel. The pass is ``w.mul_(1)``,
which reads and writes every number once. Runs are interleaved, so that all see the same machine, and the ratios are of
medians; where something else keeps the processors busy, those of the best runs beside them say more.

The pass costs memory bandwidth and RTN costs arithmetic, so the ratio depends on how the machine balances the two: the
same arithmetic as plain torch operations, without a check or a result, shows how much of it is RTN's own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from invarlock.quantization import Scheme, Workspace, fake_quantize_

LAYERS = 30
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LIMITS = {"RTN": 2.5, "RTN with error figures": 5.0}


def plain(weight: torch.Tensor) -> None:
    """Int8 per channel, and nothing else."""
    scale = torch.maximum(weight.amax(1, keepdim=True), weight.amin(1, keepdim=True).neg_()).div_(127.5)
    weight.div_(scale).round_().clamp_(-128, 127).mul_(scale)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time RTN as a ratio to one pass of w.mul_(1) over the same weights.")
    parser.add_argument("--repeats", type=int, default=31, help="runs of each, interleaved (31)")
    repeats = parser.parse_args().repeats

    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in SHAPES]
    scheme, workspace = Scheme(bitwidth=8), Workspace()
    contenders: dict[str, Callable[[torch.Tensor], object]] = {
        "one pass of w.mul_(1)": lambda weight: weight.mul_(1),
        "plain torch operations": plain,
        "RTN": lambda weight: fake_quantize_(weight, scheme, measure=False, workspace=workspace),
        "RTN with error figures": lambda weight: fake_quantize_(weight, scheme, workspace=workspace),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, work in contenders.items():
            started = time.perf_counter()
            for weight in weights:
                work(weight)
            seconds[name].append(time.perf_counter() - started)

    numbers = sum(weight.numel() for weight in weights)
    reference = seconds["one pass of w.mul_(1)"]
    print(f"{numbers / 1e6:.0f} M float32 weights, {torch.get_num_threads()} threads, {repeats} runs each")
    print(f"{'':24} {'median':>9}  ratio  best ratio  limit")
    for name, times in seconds.items():
        ratios = f"{median(times) / median(reference):5.2f}  {min(times) / min(reference):10.2f}"
        print(f"{name:24} {1000 * median(times):6.1f} ms  {ratios}  {LIMITS.get(name, '-'):>5}")


if __name__ == "__main__":
    main()
