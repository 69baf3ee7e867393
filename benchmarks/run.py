"""What the guards cost beside the passes, and a run beside what it cannot do without: ``python benchmarks/run.py``.

The references are in the run itself: the two evaluation passes, and loading plus these. Without a configuration it is
the demo, whose passes are short; the limits are meant for a real model (``examples/README.md`` says where to get it)::

    python benchmarks/run.py -c examples/smollm2.yaml --set dataset.preview_n=8 --set dataset.final_n=16
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

from invarlock.cli.commands.run import demo_folder
from invarlock.config.loading import load

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-c", "--config", help="a run's configuration; the demo's if none is given")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for invarlock run")
    args = parser.parse_args()
    demo = {"model.id": str(demo_folder() / "checkpoint")}
    config = load(args.config or str(demo_folder() / "config.yaml"), args.set, {} if args.config else demo)

    import torch

    from invarlock.pipeline import run
    from invarlock.plugins.catalog import Selection
    from invarlock.plugins.manager import PluginManager

    before = _peak_bytes()
    result = run(config, PluginManager.load(Selection()))
    report, model = result.report, result.model
    assert model is not None
    weights = sum(parameter.nbytes for parameter in model.parameters())
    timings = report["timings"]
    passes = timings["baseline pass"] + timings["edited pass"]
    needed = timings["load"] + passes

    dataset = config.dataset
    print(
        f"{Path(config.model.id).name}, {weights / MIB:.0f} MiB of weights, {torch.get_num_threads()} threads, ", end=""
    )
    print(f"{dataset.preview_n} + {dataset.final_n} windows of {dataset.seq_len} tokens\n")
    for stage, seconds in timings.items():
        print(f"{stage:16} {seconds:7.2f} s")
    print()
    for guard in report["guards"]:
        print(f"{guard['name']:16} {guard['seconds']:7.2f} s  {guard['seconds'] / passes:7.2%} of the passes")
    guards = sum(guard["seconds"] for guard in report["guards"])
    print(f"{'all guards':16} {guards:7.2f} s  {guards / passes:7.2%} of the passes (limit 5 %)")
    whole = sum(timings.values())
    print(f"{'whole run':16} {whole:7.2f} s  {whole / needed:7.2f} x loading and the passes (limit 1.10)")
    # The snapshot is in memory where that has room for it twice over.
    limit = (2.5 * weights + 1024 * MIB) / MIB
    print(f"{'peak memory':16} {_peak_bytes() / MIB:7.0f} MiB, {before / MIB:.0f} of it before (limit {limit:.0f})")


def _peak_bytes() -> int:
    """The most that this process ever held, as Linux counts it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
