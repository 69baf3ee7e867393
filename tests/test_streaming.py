"""Models whose weights stay on disk: judged and written as in memory, resumed where they were, and never touched."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, read_report, slow
from forked import FULL, Forked
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from invarlock.checkpoints.checksums import digest_of, digests
from invarlock.checkpoints.reader import Checkpoint
from invarlock.checkpoints.shard_writer import ShardedOutput
from invarlock.core.errors import UsageError
from invarlock.core.progress import showing
from invarlock.datasets.layout import Windows
from invarlock.evaluation.passes import measure
from invarlock.testing import architectures
from plugins_builtin.adapters.hf import HF_Causal_Adapter

# Of compressed-tensors, on import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

STREAMABLE = [
    architectures.llama,
    architectures.gpt2,
    architectures.t5,
    architectures.opt,
    architectures.mixtral,
    architectures.gpt_oss,
]


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The demo model in several files."""
    folder = tmp_path / "sharded"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint")
    model.save_pretrained(folder, max_shard_size="300KB")
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def saving(config: Callable[..., Path], folder: Path, format_: str = "dequantized", **sections: Any) -> Path:
    output = {"save_model": True, "format": format_}
    return config(**({"model": {"id": str(folder), "device": "cpu"}, "output": output, "guards": {}} | sections))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("format_", ["dequantized", "compressed-tensors"])
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_streamed_run_says_and_saves_what_one_in_memory_does(invarlock, config, sharded, format_, dtype) -> None:
    path = saving(config, sharded, format_, model={"id": str(sharded), "device": "cpu", "dtype": dtype})
    before = digests(sharded, "input")
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        done = invarlock("run", "-c", path, "--out", out, *stream)
        assert done.code == 0, done.out + done.err
    memory, streamed = read_report(Path("memory")), read_report(Path("streamed"))
    assert digests(sharded, "input") == before
    # What guards say of it may differ in the last digit shown.
    for report in (memory, streamed):
        report["verdict"]["findings"] = [(voice["source"], voice["action"]) for voice in report["verdict"]["findings"]]
    assert streamed["verdict"] == memory["verdict"]
    assert streamed["edit"] == memory["edit"]
    assert [guard["action"] for guard in streamed["guards"]] == ["continue"] * 5
    primary = streamed["metrics"]["primary"]
    assert primary["edited"] == pytest.approx(memory["metrics"]["primary"]["edited"], rel=1e-3)
    one, other = weights(Path("memory/model")), weights(Path("streamed/model"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    configs = (json.loads(Path(out, "model/config.json").read_text()) for out in ("memory", "streamed"))
    assert next(configs) == next(configs)
    names = {path.name for path in sharded.glob("model*")}
    assert {path.name for path in Path("streamed/model").glob("model*")} == names
    present = digests(Path("streamed/model"), "model")
    present.pop("model/report.json")
    assert present == streamed["artifacts"]


@pytest.mark.parametrize("build", STREAMABLE, ids=lambda build: build.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_architecture_is_saved_as_it_is_from_memory(invarlock, config, build, dtype) -> None:
    build().to(getattr(torch, dtype)).save_pretrained("checkpoint")
    path = saving(config, Path("checkpoint").absolute(), dataset={})
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        arguments = () if stream else ("--set", "dataset.seq_len=16", "--set", "dataset.final_n=8")
        done = invarlock("run", "-c", path, "--out", out, *stream, *arguments, "--strict")
        assert done.code == 0, done.out + done.err
    one, other = weights(Path("memory/model")), weights(Path("streamed/model"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_experts_that_are_stored_one_by_one_in_several_files(invarlock, config) -> None:
    architectures.mixtral().save_pretrained("checkpoint", max_shard_size="20KB")
    files = Checkpoint(Path("checkpoint"))
    experts = [name for name in files if ".layers.0.mlp.experts." in name or ".layers.0.block_sparse_moe." in name]
    assert len({files.entries[name].file for name in experts}) > 1
    edit = {"plan": {"bitwidth": 4, "scope": "ffn"}}
    path = saving(config, Path("checkpoint").absolute(), dataset={"seq_len": 16}, edit=edit)
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        done = invarlock("run", "-c", path, "--out", out, *stream, "--set", "eval.max_pm_ratio=100")
        assert done.code == 0, done.out + done.err
    memory, streamed = read_report(Path("memory")), read_report(Path("streamed"))
    assert streamed["edit"] == memory["edit"]
    assert [module["name"] for module in streamed["edit"]["modules"]][:2] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    one, other = weights(Path("memory/model")), weights(Path("streamed/model"))
    assert one.keys() == other.keys() == files.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    saved = Checkpoint(Path("streamed/model"))
    assert {name: entry.file for name, entry in saved.entries.items()} == {
        name: entry.file for name, entry in files.entries.items()
    }


def test_several_parameters_that_are_stored_as_one(invarlock, config) -> None:
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    HrmTextForCausalLM(
        HrmTextConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    ).save_pretrained("checkpoint")
    assert any("gqkv_proj" in name for name in Checkpoint(Path("checkpoint")))
    few = {"guards": {"order": ["invariants"]}, "dataset": {"seq_len": 8, "preview_n": 1, "final_n": 2}}
    path = saving(config, Path("checkpoint").absolute(), **few)
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        done = invarlock("run", "-c", path, "--out", out, *stream, "--set", "eval.max_pm_ratio=100")
        assert done.code == 0, done.out + done.err
    one, other = weights(Path("memory/model")), weights(Path("streamed/model"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    done = invarlock("run", "-c", saving(config, Path("checkpoint").absolute(), "compressed-tensors", dataset={}), "--out", "out", "--stream")  # fmt: skip
    assert done.code == 2
    assert "is made of tensors that are stored otherwise; run without --stream, or set output.format to" in done.err


def test_names_of_the_base_model_as_old_checkpoints_have_them(invarlock, config) -> None:
    model = architectures.gpt2()
    model.save_pretrained("checkpoint")
    old = {name.removeprefix("transformer."): tensor for name, tensor in weights(Path("checkpoint")).items()}
    old["h.0.attn.bias"] = torch.tril(torch.ones(8, 8))
    save_file(old, "checkpoint/model.safetensors", metadata={"format": "pt"})
    done = invarlock("run", "-c", saving(config, Path("checkpoint").absolute(), dataset={}), "--out", "out", "--stream")
    assert done.code == 0, done.err
    saved = weights(Path("out/model"))
    assert saved.keys() == old.keys()
    assert torch.equal(saved["h.0.attn.bias"], old["h.0.attn.bias"])
    assert torch.equal(saved["wte.weight"], model.transformer.wte.weight)
    assert not torch.equal(saved["h.0.attn.c_attn.weight"], model.transformer.h[0].attn.c_attn.weight)
    reloaded, info = type(model).from_pretrained("out/model", output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(reloaded.transformer.h[0].attn.c_attn.weight, saved["h.0.attn.c_attn.weight"])


def test_a_pass_reads_each_weight_once_and_measures_the_same(sharded, monkeypatch) -> None:
    loaded, streamed = (HF_Causal_Adapter().load_model(str(sharded), "cpu", stream=stream) for stream in (False, True))
    ids = torch.randint(0, 1000, (7, 32), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, torch.ones_like(ids), ids)
    reads: Counter[str] = Counter()
    read = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: reads.update([name]) or read(self, name))
    progress: list[tuple[int, int]] = []
    one = measure(loaded, windows[:2], windows[2:], task="causal")
    with showing(lambda *done: progress.append(done)):
        other = measure(streamed, windows[:2], windows[2:], task="causal")
    assert other.losses == pytest.approx(one.losses, rel=1e-3)
    # It is the output head too.
    assert reads.pop("model.embed_tokens.weight") == 2
    assert set(reads.values()) == {1}
    assert len(reads) == len(list(streamed.parameters())) - 1
    assert progress == [(done, 4) for done in range(1, 5)]


def test_without_text_outputs_are_not_measured_and_that_is_said(invarlock, config, sharded) -> None:
    done = invarlock("run", "-c", saving(config, sharded, dataset={}), "--out", "out", "--stream")
    assert "a streamed model needs text" in done.err
    assert "rests on weights alone" in done.out
    assert read_report(Path("out"))["metrics"]["primary"] is None


def test_damage_is_rejected_and_nothing_is_left(invarlock, config, sharded) -> None:
    path = saving(config, sharded, edit={"plan": {"bitwidth": 2, "scope": "all"}, "retry": {"max_attempts": 2}})
    done = invarlock("run", "-c", path, "--out", "out", "--stream")
    assert done.code == 1
    assert sorted(entry.name for entry in Path("out").iterdir()) == ["report.html", "report.json"]
    report = read_report(Path("out"))
    assert [attempt["bitwidth"] for attempt in report["attempts"]] == [2, 3]
    assert report["model"]["restored"] is True
    assert report["verdict"]["suspects"]


def test_guards_of_the_class_form_see_weights_as_they_know_them(invarlock, config, sharded, module) -> None:
    module(
        "looker",
        "from invarlock.core.api import Guard\nimport torch\nclass Looker(Guard):\n    name = 'looker'\n"
        "    def sizes(self, model):\n"
        "        return {name: (param.abs().max().item(), bool(torch.isnan(param).any()), tuple(param.shape),\n"
        "                       str(param.dtype), isinstance(param, torch.nn.Parameter), param.data.sum().item())\n"
        "                for name, param in model.named_parameters()}\n"
        "    def prepare(self, model, adapter, calib, policy):\n"
        "        self.before = self.sizes(model)\n        return {'ready': True}\n"
        "    def validate(self, model, adapter, context):\n"
        "        return {'passed': True, 'metrics': {'before': self.before, 'after': self.sizes(model)}}\n",
    )
    path = saving(config, sharded, guards={"order": ["looker"]}, edit={"plan": {"bitwidth": 4, "scope": "all"}})
    seen = []
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        assert invarlock("run", "-c", path, "-p", "looker", "--out", out, *stream).code == 0
        seen.append(read_report(Path(out))["guards"][0]["metrics"])
    assert seen[0] == seen[1]
    assert seen[0]["before"] != seen[0]["after"]


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("weight.mul_(2)", 3, "a streamed model is read only"),
        ("torch.mul(weight, 2, out=weight)", 3, "a streamed model is read only"),
        ("torch._foreach_mul_([weight], 2.0)", 3, "a streamed model is read only"),
        ("model.model.norm.weight = torch.nn.Parameter(weight * 2)", 3, "the guard changed the model (model.norm.weight)"),
        ("model.model.rotary_emb.inv_freq.mul_(2)", 3, "the guard changed the model (model.rotary_emb.inv_freq)"),
        ("model.half()", 3, "the guard changed the model ("),
        ("weight[0] = 7", 0, ""),
        ("weight.view(-1)[:3].mul_(9)", 0, ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["prepare", "validate"])
def test_what_a_guard_does_to_a_streamed_weight_is_never_saved(
    invarlock, config, sharded, module, change, code, said, when
) -> None:
    module(
        "changer",
        f"from invarlock import hookimpl\nimport torch\n@hookimpl\ndef invarlock_{when}(model):\n"
        f"    weight = model.model.norm.weight\n    with torch.no_grad(): {change}\n"
        "    return {'passed': True, 'ready': True}\n"
        + ("" if when == "validate" else "@hookimpl\ndef invarlock_validate(): return {'passed': True}\n"),
    )
    path = saving(config, sharded, guards={"order": ["changer", "invariants"]})
    done = invarlock("run", "-c", path, "-p", "changer", "--out", "out", "--stream")
    assert done.code == code, done.out + done.err
    assert said in read_report(Path("out"))["guards"][0]["message"]
    if code:
        assert not Path("out/model").exists()
    else:
        assert torch.equal(weights(Path("out/model"))["model.norm.weight"], weights(sharded)["model.norm.weight"])


def test_tied_weights_that_are_stored_twice(invarlock, config, sharded) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    embedding = weights(sharded)["model.embed_tokens.weight"]

    def store_head(head: torch.Tensor) -> None:
        save_file(load_file(last) | {"lm_head.weight": head}, last, metadata={"format": "pt"})
        _edit_index(sharded, lambda names: names.update({"lm_head.weight": last.name}))

    store_head(embedding.clone())
    plan = {"plan": {"bitwidth": 8, "scope": "all", "include": ["*embed*", "*mlp*"]}}
    path = saving(config, sharded, edit=plan)
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        assert invarlock("run", "-c", path, "--out", out, *stream).code == 0
    one, other = weights(Path("memory/model")), weights(Path("streamed/model"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    store_head(embedding * 2)
    done = invarlock("run", "-c", path, "--out", "out", "--stream")
    assert done.code == 2
    assert "are tied, and differ" in done.err


def test_types_are_those_that_loading_into_memory_gives(invarlock, config, sharded) -> None:
    for path in sharded.glob("*.safetensors"):
        wide = {name: tensor.float() if "norm" in name else tensor for name, tensor in load_file(path).items()}
        save_file(wide, path, metadata={"format": "pt"})
    for out, stream in (("memory", ()), ("streamed", ("--stream",))):
        assert invarlock("run", "-c", saving(config, sharded), "--out", out, *stream).code == 0
    one, other = weights(Path("memory/model")), weights(Path("streamed/model"))
    assert {name: tensor.dtype for name, tensor in one.items()} == {
        name: tensor.dtype for name, tensor in other.items()
    }
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_where_there_is_a_single_file_too_that_is_read(sharded) -> None:
    single = {name: tensor * 2 for name, tensor in weights(sharded).items()}
    save_file(single, sharded / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(Checkpoint(sharded)["model.norm.weight"], single["model.norm.weight"])
    loaded = HF_Causal_Adapter().load_model(str(sharded), "cpu")
    assert torch.equal(loaded.model.norm.weight, single["model.norm.weight"])


def test_a_model_that_changes_its_heads_logits_is_not_measured_wrongly(invarlock, config) -> None:
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    shape = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    Gemma2ForCausalLM(Gemma2Config(**shape, **heads, final_logit_softcapping=5.0)).save_pretrained("gemma")
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained("gemma")
    done = invarlock("run", "-c", saving(config, Path("gemma").absolute()), "--out", "out", "--stream")
    assert done.code == 2
    assert "it changes its head's logits" in done.err


# -- cut off -----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_goes_on_and_ends_with_the_same_bytes(config, forking, sharded) -> None:
    path = saving(config, sharded, guards={"order": ["invariants"]})
    # Slow enough to be killed between two shards.
    program = (
        "import time\nfrom invarlock.checkpoints import shard_writer\nwrite = shard_writer.ShardedOutput.write\n"
        "def slowly(self, file, *rest):\n    print('writing', file, flush=True)\n    time.sleep(0.2)\n    write(self, file, *rest)\n"
        "shard_writer.ShardedOutput.write = slowly\n"
    )

    def start(out: str) -> Forked:
        return forking.start("run", "-c", path, "--out", out, "--stream", "-q", program=program)

    def written(process: Forked) -> int:
        return process.said()[0].count("writing")

    def finish(out: str) -> int:
        process = start(out)
        assert process.wait() == 0
        return written(process)

    shards = len(list(sharded.glob("*.safetensors")))
    assert finish("whole") == shards
    for sign in (signal.SIGKILL, signal.SIGINT):
        cut = start("cut")
        while written(cut) < 2:
            assert cut.poll() is None, cut.said()
            time.sleep(0.01)
        cut.send(sign)
        assert cut.wait() != 0
        assert not Path("cut/model").exists()
        assert not Path("cut/report.json").exists()
    assert 0 < finish("cut") <= shards - 2
    one, other = digests(Path("whole/model"), "model"), digests(Path("cut/model"), "model")
    for reports in (one, other):
        reports.pop("model/report.json")
    assert one == other
    assert sorted(entry.name for entry in Path("cut").iterdir()) == ["model", "report.html", "report.json"]


@pytest.mark.parametrize("moment", ["_write_page", *slow("render_html")])
def test_a_run_that_was_killed_in_its_last_steps_is_ended_by_the_next(
    invarlock, config, forking, sharded, moment, monkeypatch
) -> None:
    start = ("run", "-c", saving(config, sharded, guards={"order": ["invariants"]}), "--stream", "-q", "--out")
    assert invarlock(*start, "whole").code == 0
    program = (
        f"import signal\nfrom invarlock.pipeline import writing\n"
        f"writing.{moment} = lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert forking.start(*start, "cut", program=program).wait() == -signal.SIGKILL
    assert not Path("cut/report.json").exists()
    assert not Path("cut/model").exists()
    written: list[str] = []
    write = ShardedOutput.write
    monkeypatch.setattr(
        ShardedOutput, "write", lambda self, file, *rest: written.append(file) or write(self, file, *rest)
    )
    done = invarlock(*start, "cut")
    assert (done.code, written) == (0, []), done.err
    assert sorted(entry.name for entry in Path("cut").iterdir()) == ["model", "report.html", "report.json"]
    one, other = digests(Path("whole/model"), "model"), digests(Path("cut/model"), "model")
    assert one.pop("model/report.json") != other.pop("model/report.json")
    assert one == other == read_report(Path("cut"))["artifacts"]
    assert invarlock(*start, "cut").code == 2


def test_another_plan_does_not_go_on_with_the_shards_of_the_first(tmp_path) -> None:
    def shards(**identity: int) -> ShardedOutput:
        return ShardedOutput(tmp_path, ["one.safetensors", "two.safetensors"], identity)

    first = shards(bits=8)
    first.write("one.safetensors", {"weight": torch.ones(2)}, ["noted"])
    with pytest.raises(UsageError, match=r"lacks two\.safetensors"), first.completed(tmp_path / "model"):
        pass
    assert not (tmp_path / "model").exists()
    assert shards(bits=8).notes("one.safetensors") == ["noted"]
    assert shards(bits=8).notes("two.safetensors") is None
    (tmp_path / ".model.partial" / "one.safetensors").write_bytes(b"short")
    assert shards(bits=8).notes("one.safetensors") is None
    assert shards(bits=4).notes("one.safetensors") is None
    assert list((tmp_path / ".model.partial").iterdir()) == []


# -- broken input ------------------------------------------------------------------------------------------------------


def _edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def _truncate(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1000])


def _garble_header(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[1]
    content = bytearray(path.read_bytes())
    content[12] ^= 0x40
    path.write_bytes(content)


def _repeat_tensor(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    save_file(load_file(first) | load_file(second), second, metadata={"format": "pt"})


def _remove_file(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


BROKEN = {
    "truncated": (_truncate, "model-00002-of"),
    "header": (_garble_header, "model-00002-of"),
    "outside": (lambda folder: _edit_index(folder, lambda names: names.update({"model.norm.weight": "../secret.safetensors"})), "not a file of this folder"),
    "absolute": (lambda folder: _edit_index(folder, lambda names: names.update({"model.norm.weight": "/etc/passwd"})), "not a file of this folder"),
    "missing file": (_remove_file, "does not exist"),
    "wrong file": (lambda folder: _edit_index(folder, lambda names: names.update({"model.norm.weight": names["model.embed_tokens.weight"]})), "which does not hold it"),
    "unknown tensor": (lambda folder: _edit_index(folder, lambda names: names.update({"ghost": names["model.norm.weight"]})), "lists ghost in"),
    "twice": (_repeat_tensor, "is in both"),
    "no map": (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda folder: [path.unlink() for path in folder.glob("model*")], "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "memory"])
def test_a_broken_checkpoint_is_one_line_and_nothing_written(invarlock, config, sharded, how, stream) -> None:
    spoil, said = BROKEN[how]
    spoil(sharded)
    before = digests(sharded, "input")
    done = invarlock("run", "-c", saving(config, sharded), "--out", "out", *(["--stream"] if stream else []))
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1
    assert said in done.err
    assert digests(sharded, "input") == before
    assert not Path("out").exists()


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "memory"])
def test_a_bit_that_flipped_is_noticed_by_a_digest(invarlock, config, sharded, stream) -> None:
    files = sorted(sharded.glob("*.safetensors"))
    sums = "".join(f"{digest_of(path)} *{path.name}\n" for path in files[1:])
    (sharded / "SHA256SUMS").write_text(sums)
    start = ("run", "-c", saving(config, sharded), "--force", *(["--stream"] if stream else []))
    done = invarlock(*start, "--out", "sound")
    assert done.code == 0, done.err
    assert read_report(Path("sound"))["timings"]["check digests"] > 0
    content = bytearray(files[1].read_bytes())
    content[-5] ^= 0x40
    files[1].write_bytes(content)
    done = invarlock(*start, "--out", "out")
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert f"{files[1]} does not match its digest in {sharded / 'SHA256SUMS'}" in done.err
    assert not Path("out").exists()


def test_a_model_of_ours_is_held_against_its_report(invarlock, config) -> None:
    shutil.copytree(DEMO / "checkpoint", "model")
    file, report = Path("model/model.safetensors").absolute(), Path("model/report.json").absolute()
    path = config(model={"id": str(file.parent)}, guards={"order": ["invariants"]})
    start = ("run", "-c", path, "--force", "--out", "out")
    for digest, code in (digest_of(file), 0), ("0" * 64, 2):
        report.write_text(json.dumps({"artifacts": {"model/model.safetensors": digest}}))
        done = invarlock(*start)
        assert done.code == code, done.err
    assert f"{file} does not match its digest in {report}" in done.err
    report.write_text("[]")
    assert invarlock(*start).code == 0


def test_a_shard_that_changes_while_it_is_read_is_noticed(sharded) -> None:
    checkpoint = Checkpoint(sharded)
    name = next(iter(checkpoint))
    assert checkpoint[name].numel()
    path = sharded / checkpoint.entries[name].file
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    with pytest.raises(UsageError, match="changed while it was read"):
        checkpoint[name]
    path.unlink()
    with pytest.raises(UsageError, match="disappeared"):
        checkpoint.fingerprint()


@pytest.mark.parametrize(
    ("ending", "said"),
    [
        ("experts.1.w1.weight", "gate_up_proj cannot be made of model.layers.0."),
        ("experts.1.w2.weight", "down_proj has shape (3, 32, 24), but the configuration describes (4, 32, 24)"),
        ("layers.0.self_attn.q_proj.weight", "cannot be streamed, it has no tensor model.layers.0.self_attn.q_proj.weight"),
    ],
)  # fmt: skip
def test_a_tensor_that_is_missing_is_said(invarlock, config, ending, said) -> None:
    architectures.mixtral().save_pretrained("experts")
    stored = weights(Path("experts"))
    gone = next(name for name in stored if name.endswith(ending))
    save_file({name: stored[name] for name in stored if name != gone}, "experts/model.safetensors")
    done = invarlock("run", "-c", saving(config, Path("experts").absolute(), dataset={}), "--out", "out", "--stream")
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_what_cannot_be_streamed_is_said(invarlock, config) -> None:
    Path("some.gguf").touch()
    done = invarlock("run", "-c", config(model={"id": "some.gguf", "adapter": "hf_gguf"}), "--stream", "--out", "out")
    assert done.code == 2
    assert "a GGUF file cannot be streamed" in done.err
    done = invarlock("run", "--demo", "--stream", "--out", "out", "--set", "output.save_model=true", "--set", "output.format=gguf")  # fmt: skip
    assert done.code == 2
    assert "run without --stream" in done.err


def test_a_full_disk_is_one_line_and_leaves_nothing(config, forking, sharded) -> None:
    path = saving(config, sharded, guards={"order": ["invariants"]})
    run = forking.start("run", "-c", path, "--out", "out", "-q", "--stream", program=FULL.format(bytes=100_000))
    assert run.wait() == 2, run.said()
    err = run.said()[1]
    assert "output.dir: out could not be written" in err
    assert "Traceback" not in err
    assert not Path("out").exists()


def _as_others() -> None:
    """Root may write anywhere (CAP_DAC_OVERRIDE), unless it gives that up for what it starts (PR_CAPBSET_DROP)."""
    ctypes.CDLL(None).prctl(24, 1)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "memory"])
def test_a_folder_without_write_permission_is_one_line(config, sharded, stream) -> None:
    path = saving(config, sharded, guards={"order": ["invariants"]})
    Path("locked").mkdir(mode=0o500)
    before = digests(sharded, "input")
    arguments = ["run", "-c", str(path), "--out", "locked/out", "-q", *(["--stream"] if stream else [])]
    done = subprocess.run(
        [sys.executable, "-m", "invarlock", *arguments], capture_output=True, text=True, preexec_fn=_as_others
    )
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"invarlock: error: output\.dir: no permission to write to \S+locked\n", done.stderr)
    assert list(Path("locked").iterdir()) == []
    assert digests(sharded, "input") == before


# -- compare -----------------------------------------------------------------------------------------------------------


def test_comparing_weights_leaves_them_on_disk(invarlock, config, sharded, module) -> None:
    invarlock("run", "-c", saving(config, sharded), "--out", "saved")
    module(
        "spy",
        "from invarlock import hookimpl\n"
        "@hookimpl\ndef invarlock_validate(model):\n"
        "    return {'passed': True, 'metrics': {'streamed': hasattr(model, 'streaming')}}\n",
    )
    arguments = ("compare", "--baseline", sharded, "--subject", "saved/model", "--out", "out", "-p", "spy")
    order = "guards.order=[spy, invariants, reconstruction, spectral]"
    assert invarlock(*arguments, "--weights-only", "--set", order).code == 0
    report = read_report(Path("out"))
    assert report["guards"][0]["metrics"]["streamed"] is True
    assert report["verdict"]["action"] == "continue"
    changes = {module["change"] for module in report["edit"]["modules"]}
    assert changes == {"unchanged", "a grid of 256 levels a row (8 bits)"}


def test_what_cannot_be_streamed_is_compared_in_memory(invarlock) -> None:
    invarlock("run", "--demo", "--set", "output.save_model=true", "--out", "saved")
    done = invarlock("compare", "--baseline", DEMO / "checkpoint", "--subject", "saved/model", "--weights-only", "--out", "out")  # fmt: skip
    assert done.code == 0, done.err


def test_files_are_written_for_everybody_to_read(invarlock, config, sharded) -> None:
    invarlock("run", "-c", saving(config, sharded), "--out", "out", "--stream")
    assert {path.stat().st_mode & 0o777 for path in Path("out/model").iterdir()} == {0o644}
    with safe_open(sorted(Path("out/model").glob("*.safetensors"))[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    shutil.rmtree("out")
