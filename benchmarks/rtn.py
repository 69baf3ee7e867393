"""RTN against one pass over the same weights: ``python benchmarks/rtn.py``.

The weights have the shapes of the linear layers of SmolLM2-135M, float32. The pass is ``w.mul_(1)``, which reads and
writes every number once; the ratios are to its median, the runs interleaved so that all see the same machine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

from invarlock.quantization import Scheme, Scratch, quantize_

LAYERS = 30
SHAPES = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LIMITS = {"RTN": 2.5, "RTN with error figures": 5.0}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time RTN as a ratio to one pass of w.mul_(1) over the same weights.")
    parser.add_argument("--repeats", type=int, default=31, help="runs of each, interleaved; medians are shown (31)")
    parser.add_argument("--bitwidth", type=int, default=8, help="bits per code (8)")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    weights = [torch.randn(shape) for _ in range(LAYERS) for shape in SHAPES]
    scheme, scratch = Scheme(bitwidth=arguments.bitwidth), Scratch()
    contenders: dict[str, Callable[[torch.Tensor], object]] = {
        "one pass of w.mul_(1)": lambda weight: weight.mul_(1),
        "RTN": lambda weight: quantize_(weight, scheme, measure=False, scratch=scratch),
        "RTN with error figures": lambda weight: quantize_(weight, scheme, scratch=scratch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.repeats):
        for name, work in contenders.items():
            started = time.perf_counter()
            for weight in weights:
                work(weight)
            seconds[name].append(time.perf_counter() - started)

    numbers = sum(weight.numel() for weight in weights)
    reference = median(seconds["one pass of w.mul_(1)"])
    print(f"{numbers / 1e6:.0f} M float32 weights, {torch.get_num_threads()} threads, {arguments.repeats} runs each")
    for name, times in seconds.items():
        limit = f", limit {LIMITS[name]}" if name in LIMITS else f", {8 * numbers / reference / 1e9:.0f} GB/s"
        print(f"{name:24} {1000 * median(times):6.1f} ms  ratio {median(times) / reference:5.2f}{limit}")


if __name__ == "__main__":
    main()
