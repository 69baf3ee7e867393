"""Rounding, fingerprints, passes, guards and whole runs on one device: ``python benchmarks/device.py``.

Each figure is a ratio to a reference on the same device and in the same process: one pass of ``w.mul_(1)`` over the
weights, a bare loop of ``model(batch)`` and ``cross_entropy``, or loading and the two passes of a run. Models are
random: one of SmolLM2-135M's shape in float32, and a Llama of 2.8 G parameters in bfloat16. ``--small`` takes tiny
ones, to try the benchmark itself where there is no GPU.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.cli.commands.run import demo_folder
from invarlock.config.loading import load
from invarlock.datasets.generated import write_text
from invarlock.datasets.layout import WindowLayout, Windows
from invarlock.evaluation.passes import measure
from invarlock.models.fingerprint import Fingerprint
from invarlock.models.snapshot import Snapshot
from invarlock.pipeline import run, run_streamed
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.quantization import Plan
from invarlock.quantization.model import quantize_weights
from invarlock.quantization.selection import planned_weights

PLANS = {
    "8 bits per channel": Plan(8, scope="all"),
    "4 bits, groups of 128": Plan(4, group_size=128, scope="all"),
}
LLAMA = {"max_position_embeddings": 4096, "tie_word_embeddings": False}
SMOL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
BIG = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
}
LAYERS = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@dataclass
class Bench:
    """A device, and the sizes of what is measured on it."""

    device: torch.device
    small: bool

    def seconds(self, work: Callable[[], object]) -> float:
        """Seconds that some work takes, to its end on the device."""
        self._wait()
        started = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - started

    def peak(self) -> int:
        """Bytes of the device's memory that were in use at most."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def show(self, what: str, seconds: float, reference: float | None, limit: str) -> None:
        ratio = "" if reference is None else f"{seconds / reference:6.2f} x"
        print(f"{what:64} {1000 * seconds:9.1f} ms {ratio:>9}  {limit}", flush=True)

    def llama(self, dtype: torch.dtype, **shape: int) -> Any:
        with self.device:
            return LlamaForCausalLM(LlamaConfig(**LLAMA, **shape)).to(dtype).eval()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def rounding(bench: Bench) -> None:
    limits = {torch.float32: ("1.6", "2.2", "2.2", "3"), torch.bfloat16: ("2.2", "3", "2.2", "3")}
    for dtype, of_dtype in limits.items():
        model = bench.llama(dtype, vocab_size=64, **(TINY if bench.small else LAYERS))
        work: dict[str, Callable[[], object]] = {}
        for name, plan in PLANS.items():
            planned = planned_weights(model, plan)
            for figures in (False, True):
                label = f"{name}{', with figures' if figures else ''}"
                work[label] = partial(quantize_weights, planned, measure=figures)
        weights = [planned.target.parameter.detach() for planned in planned_weights(model, Plan(8, scope="all"))]
        times: dict[str, list[float]] = {name: [] for name in work}
        reference = []
        for _ in range(7):
            reference.append(bench.seconds(partial(_mul_, weights)))
            for name, round_all in work.items():
                times[name].append(bench.seconds(round_all))
        numbers = sum(weight.numel() for weight in weights)
        bench.show(f"{numbers / 1e9:.2f} G {dtype}: w.mul_(1)", median(reference[1:]), None, "")
        for (name, found), limit in zip(times.items(), of_dtype, strict=True):
            bench.show(f"  {name}", median(found[1:]), median(reference[1:]), f"limit {limit}")


def _mul_(weights: list[Tensor]) -> None:
    for weight in weights:
        weight.mul_(1)


def passes(bench: Bench, name: str, model: Any, preview: int, final: int, length: int, limit: str) -> int:
    """
    :returns: bytes of the device that the bare loop took at most.
    """
    ids = torch.randint(model.config.vocab_size, (preview + final, length))
    windows = Windows(ids, torch.ones_like(ids), ids)
    pair = windows[:preview], windows[preview:]
    there = ids.to(bench.device)

    @torch.no_grad()
    def bare() -> None:
        for batch in torch.split(there, max(1, (1 << 14) // length)):
            logits = model(batch, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none")

    bench.forget_peak()
    bare()
    peak = bench.peak()
    reference = min(bench.seconds(bare) for _ in range(3))
    bench.show(f"{name}: bare loop over {preview} + {final} windows of {length} tokens", reference, None, "")
    record = measure(model, *pair, task="causal").record
    bench.show(
        "  baseline pass", bench.seconds(lambda: measure(model, *pair, task="causal")), reference, f"limit {limit}"
    )
    edited = bench.seconds(lambda: measure(model, *pair, task="causal", reference=record))
    bench.show("  edited pass", edited, reference, f"limit {limit}")
    return peak


def keeping(bench: Bench, model: Any) -> None:
    Fingerprint.of(model)
    bench.show("  fingerprint", bench.seconds(lambda: Fingerprint.of(model)), None, "limit 0.5 s, of all in a run")
    bench.show("  snapshot", bench.seconds(lambda: Snapshot(model)), None, "limit 1 s")


def writing(bench: Bench, model: Any) -> None:
    count, length = (4, 32) if bench.small else (40, 256)
    layout = WindowLayout(length)
    write_text(model, layout, 2, seed=0)
    seconds = bench.seconds(lambda: write_text(model, layout, count, seed=0))
    bench.show(f"{count} windows of {length} tokens, written by the model", seconds, None, "limit 5 s")


def whole_runs(bench: Bench, folder: Path, bare_peak: int) -> None:
    """
    :param folder: of a model's checkpoint.
    :param bare_peak: bytes of the device that a bare pass of the model took at most.
    """
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    settings = [
        f"model.device={bench.device}",
        "model.dtype=bfloat16",
        "edit.plan.bitwidth=4",
        "edit.plan.group_size=32" if bench.small else "edit.plan.group_size=128",
        "edit.plan.scope=all",
        "eval.max_pm_ratio=100",
        f"dataset.seq_len={64 if bench.small else 1024}",
        f"dataset.stride={64 if bench.small else 1024}",
        "dataset.preview_n=2" if bench.small else "dataset.preview_n=8",
        "dataset.final_n=4" if bench.small else "dataset.final_n=56",
    ]
    config = load(str(demo_folder() / "config.yaml"), settings, {"model.id": str(folder)})
    for name, pipeline in (("run", run), ("run --stream", run_streamed)):
        output = OutputFolder(folder.parent / f"{folder.name}-{name.split()[-1]}")
        bench.forget_peak()
        report = pipeline(config, PluginManager.load(Selection()), output=output).report
        beyond = bench.peak() - bare_peak
        print(f"{name}: {beyond / 2**30:.2f} GiB beyond a bare pass, limit {weights / 2**30 + 2:.2f} GiB")
        timings = report["timings"]
        needed = timings["load"] + timings["baseline pass"] + timings["edited pass"]
        guards = sum(guard["seconds"] for guard in report["guards"])
        bench.show(f"{name}: load and passes", needed, None, "")
        for stage, seconds in timings.items():
            bench.show(f"  {stage}", seconds, needed, "")
        bench.show("  guards, each by itself", guards, needed, "limit 1 s; streamed, 2 x reading the weights")
        bench.show("  all", sum(timings.values()), needed, "limit 1.3")


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="1GB")
    for file in (demo_folder() / "checkpoint").glob("tokenizer*"):
        shutil.copy(file, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny models, to try the benchmark itself")
    args = parser.parse_args()
    bench = Bench(torch.device(args.device), args.small)
    named = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else bench.device
    print(f"{named}, torch {torch.__version__}")
    torch.manual_seed(0)
    rounding(bench)

    smol = bench.llama(torch.float32, **({"vocab_size": 1000, **TINY} if bench.small else SMOL))
    passes(bench, "135 M, float32", smol, 8, 128, 32 if bench.small else 512, "1.5")
    writing(bench, smol)
    del smol

    big = bench.llama(torch.bfloat16, vocab_size=_vocabulary(), **(TINY if bench.small else BIG))
    bare_peak = passes(bench, "2.8 G, bfloat16", big, 8, 56, 64 if bench.small else 1024, "1.3")
    keeping(bench, big)
    with tempfile.TemporaryDirectory() as name:
        save(big, folder := Path(name) / "model")
        # A run has one of its own.
        del big
        whole_runs(bench, folder, bare_peak)


def _vocabulary() -> int:
    """Tokens of the demo's tokenizer, which the random model is given."""
    return int(LlamaConfig.from_pretrained(demo_folder() / "checkpoint").vocab_size)


if __name__ == "__main__":
    main()
