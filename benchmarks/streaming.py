"""A checkpoint larger than memory: ``python benchmarks/streaming.py --cgroup /sys/fs/cgroup/memory/two-gib``.

It writes a synthetic Llama checkpoint (random bfloat16 weights, shards of half a gigabyte), copies it with ``cp``, and
runs ``invarlock run --stream`` on it, saving the weights. The files are dropped from the system's cache before each.
The ceiling is that of a memory cgroup that is there already::

    mkdir /sys/fs/cgroup/memory/two-gib
    echo 2147483648 > /sys/fs/cgroup/memory/two-gib/memory.limit_in_bytes
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

from invarlock.cli.commands.run import demo_folder

SHARD = 500_000_000
PER_LAYER = 202_383_360 * 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the checkpoint (8)")
    parser.add_argument("--folder", type=Path, default=Path("streaming-benchmark"), help="where it all goes")
    parser.add_argument("--cgroup", type=Path, help="a memory cgroup for the run to be in")
    parser.add_argument(
        "--windows", type=int, default=0, help="windows of 128 tokens for the metric; 0 measures no outputs"
    )
    args = parser.parse_args()
    model = args.folder / "checkpoint"
    if not model.exists():
        write_checkpoint(model, round(args.gigabytes * 1e9 / PER_LAYER))
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    copied = args.folder / "copy"
    forget(model)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", model, copied], check=True)
    os.sync()
    copying = time.perf_counter() - started
    shutil.rmtree(copied)
    out = args.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "invarlock", "run", "--stream", "-c", config(args, model), "--out", out]
    forget(model)
    started = time.perf_counter()
    done = subprocess.run(list(map(str, command)), preexec_fn=lambda: enter(args.cgroup), check=False)
    whole = time.perf_counter() - started
    os.sync()
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    timings = json.loads((out / "report.json").read_text())["timings"]
    print(f"\n{size / 1e9:.2f} GB in {len(list(model.glob('*.safetensors')))} shards; exit status {done.returncode}")
    print(
        f"peak resident memory {peak:.0f} MiB, pages of the files included"
        + (f", in {args.cgroup}" if args.cgroup else "")
    )
    print(f"cp and sync         {copying:7.1f} s  {size / copying / 1e6:6.0f} MB/s")
    rounding = timings["quantize"]
    ratio = f"{copying / rounding:.2f} x cp"
    print(f"round and write     {rounding:7.1f} s  {size / rounding / 1e6:6.0f} MB/s  {ratio}")
    print(f"the whole run       {whole:7.1f} s")
    for stage, seconds in timings.items():
        print(f"  {stage:16} {seconds:7.1f} s")


def forget(folder: Path) -> None:
    """Drop the pages of all files: what is cached costs no reading, and is charged to whoever read it first."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def enter(cgroup: Path | None) -> None:
    if cgroup is not None:
        (cgroup / "cgroup.procs").write_text(str(os.getpid()))


def config(args: argparse.Namespace, model: Path) -> Path:
    path: Path = args.folder / "config.yaml"
    dataset = {"provider": "demo", "seq_len": 128, "preview_n": 2, "final_n": args.windows} if args.windows else {}
    plan = {"bitwidth": 8, "scope": "all"}
    sections = {"model": {"id": str(model), "device": "cpu"}, "dataset": dataset, "edit": {"plan": plan},
                "output": {"save_model": True, "format": "dequantized"}}  # fmt: skip
    path.write_text(json.dumps(sections))
    return path


def write_checkpoint(folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    AutoTokenizer.from_pretrained(demo_folder() / "checkpoint").save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    shape.save_pretrained(folder)
    weight_map: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        file = f"model-{number:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    generator = torch.Generator().manual_seed(0)
    for name, size in shapes(shape):
        weight = torch.ones(size) if len(size) == 1 else torch.randn(size, generator=generator) * 0.02
        shard[name] = weight.bfloat16()
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    if shard:
        flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def shapes(config: LlamaConfig) -> list[tuple[str, tuple[int, ...]]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (config.vocab_size, hidden))]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        found += [(f"{prefix}.self_attn.{part}_proj.weight", (hidden, hidden)) for part in "qkvo"]
        found += [(f"{prefix}.mlp.{part}_proj.weight", (inner, hidden)) for part in ("gate", "up")]
        found += [(f"{prefix}.mlp.down_proj.weight", (hidden, inner))]
        found += [(f"{prefix}.{part}_layernorm.weight", (hidden,)) for part in ("input", "post_attention")]
    return [*found, ("model.norm.weight", (hidden,)), ("lm_head.weight", (config.vocab_size, hidden))]


if __name__ == "__main__":
    main()
