"""Saved models: what was judged is what others load, to the last bit."""

from __future__ import annotations

import json
import resource
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import DEMO, read_report, slow
from forked import FULL
from huggingface_hub import ModelCard
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from invarlock.checkpoints.checksums import digests
from invarlock.checkpoints.output_folder import OutputFolder
from invarlock.config.loading import load
from invarlock.exporters import compressed_tensors, dequantized, gguf, invarlock_exporters
from invarlock.pipeline import run
from invarlock.plugins.catalog import Selection
from invarlock.plugins.manager import PluginManager
from invarlock.testing import architectures

# Of compressed-tensors, on import, and of the loader that transformers has for GGUF.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def checkpoint(build: Any, dtype: str = "float32", **changes: Any) -> Path:
    build(**changes).to(getattr(torch, dtype)).save_pretrained("checkpoint")
    return Path("checkpoint").absolute()


def guarded(config: Any, folder: Path, format_: str, **plan: Any) -> torch.nn.Module:
    """Run and save; the model that the guards saw."""
    path = config(
        model={"id": str(folder), "device": "cpu"},
        dataset={"seq_len": 16, "preview_n": 1, "final_n": 2},
        edit={"plan": {"scope": "all"} | plan},
        eval={"max_pm_ratio": 100},
        output={"save_model": True, "format": format_},
    )
    result = run(load(str(path), [], {}), PluginManager.load(Selection()), output=OutputFolder(Path("out")))
    assert result.report["verdict"]["accepted"], result.report["verdict"]
    assert result.model is not None
    return result.model


def largest_difference(model: Any, other: Any) -> float:
    assert next(other.parameters()).dtype == next(model.parameters()).dtype
    ids = torch.randint(0, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}
    with torch.no_grad():
        return float((model(**inputs).logits - other.eval()(**inputs).logits).abs().max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "plan",
    [{"bitwidth": 8}, {"bitwidth": 4, "group_size": 16}, {"bitwidth": 3}, {"bitwidth": 2, "group_size": 8},
     {"bitwidth": 8, "per_channel": False}, {"bitwidth": 5, "clamp_ratio": 0.01}],
    ids=str,
)  # fmt: skip
def test_packed_logits_are_the_guarded_models(config, dtype: str, plan: dict[str, Any]) -> None:
    model = guarded(config, checkpoint(architectures.llama, dtype), "compressed-tensors", **plan)
    loaded = AutoModelForCausalLM.from_pretrained("out/model", dtype=dtype)
    assert largest_difference(model, loaded) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_logits_of_another_architecture(config, dtype: str) -> None:
    model = guarded(config, checkpoint(architectures.opt, dtype), "compressed-tensors", bitwidth=4, group_size=16)
    assert largest_difference(model, AutoModelForCausalLM.from_pretrained("out/model", dtype=dtype)) == 0.0


def test_a_packed_checkpoint_says_what_it_is_and_is_smaller(config) -> None:
    guarded(config, DEMO / "checkpoint", "compressed-tensors", bitwidth=4, group_size=32)
    described = json.loads(Path("out/model/config.json").read_text())["quantization_config"]
    weights = described["config_groups"]["group_0"]["weights"]
    assert (described["quant_method"], described["format"]) == ("compressed-tensors", "pack-quantized")
    assert (weights["num_bits"], weights["strategy"], weights["group_size"]) == (4, "group", 32)
    assert described["ignore"] == ["lm_head"]
    size = {
        folder: (folder / "model.safetensors").stat().st_size for folder in (DEMO / "checkpoint", Path("out/model"))
    }
    assert size[Path("out/model")] < 0.5 * size[DEMO / "checkpoint"]


# A masked model needs a tokenizer; test_run saves it.
@pytest.mark.parametrize(
    "build",
    [build for build in architectures.ARCHITECTURES.values() if build is not architectures.bert],
    ids=lambda build: build.__name__,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantized_weights_are_the_guarded_models(config, build, dtype: str) -> None:
    model = guarded(config, checkpoint(build, dtype), "dequantized", bitwidth=8)
    loaded = type(model).from_pretrained("out/model", dtype="auto")
    assert largest_difference(model, loaded) == 0.0


def test_dequantized_is_cut_into_shards_as_the_input_was(config) -> None:
    architectures.llama().save_pretrained("checkpoint", max_shard_size="20KB")
    guarded(config, Path("checkpoint").absolute(), "dequantized", bitwidth=8)
    before, after = (
        sorted(path.name for path in Path(folder).glob("*.safetensors")) for folder in ("checkpoint", "out/model")
    )
    assert len(before) > 2
    assert after == before


@pytest.mark.parametrize(
    ("dtype", "bitwidth", "symmetric"),
    [
        *((dtype, bits, True) for dtype in ("float32", "bfloat16", "float16") for bits in (4, 5, 8)),
        *((dtype, 4, False) for dtype in ("bfloat16", "float16")),
        ("float32", 5, False),
        *slow(("float32", 4, False), ("bfloat16", 5, False), ("float16", 5, False)),
    ],
)
def test_gguf_logits_are_the_guarded_models(config, dtype: str, bitwidth: int, symmetric: bool) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype=dtype)
    with torch.no_grad():
        # Scales far too small for float16's usual numbers.
        model.model.layers[0].mlp.up_proj.weight[:64].mul_(1e-3)
    model.save_pretrained("checkpoint")
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained("checkpoint")
    model = guarded(
        config, Path("checkpoint").absolute(), "gguf", bitwidth=bitwidth, symmetric=symmetric, group_size=32
    )
    loaded = AutoModelForCausalLM.from_pretrained("out/model", gguf_file="model.gguf", dtype=dtype)
    assert largest_difference(model, loaded) == 0.0
    text = (DEMO / "text.jsonl").read_text()[:5000]
    before, after = (
        AutoTokenizer.from_pretrained("checkpoint"),
        AutoTokenizer.from_pretrained("out/model", gguf_file="model.gguf"),
    )
    assert after(text).input_ids == before(text).input_ids


def test_gguf_of_untied_and_biased_weights(config) -> None:
    kind = transformers.Qwen2Config(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(kind)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained("checkpoint")
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained("checkpoint")
    model = guarded(config, Path("checkpoint").absolute(), "gguf", bitwidth=8, group_size=32)
    loaded = AutoModelForCausalLM.from_pretrained("out/model", gguf_file="model.gguf", dtype="float32")
    assert largest_difference(model, loaded) == 0.0


TEXT = (
    "In 1984, 1,234 men's 'cos THEY'LL won't;\n\n\n  def f(x):\n\treturn x**2 # äöü — “quoted”\r\n   tail   \n"
    "<|endoftext|>héllo<|im_start|> 3.14159² x=10+20"
)


def splitting_as(name: str) -> tuple[Path, Any]:
    """The demo model with a special word more, and a tokenizer that splits text as llama.cpp does under a name."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint", extra_special_tokens=["<|im_start|>"])
    model = AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint", dtype="float32")
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained("checkpoint")
    tokenizer.save_pretrained("checkpoint")
    described = json.loads(Path("checkpoint/tokenizer.json").read_text())
    steps = [{"trim_offsets": True} | step for step in gguf.SPLITTING[name]]
    described["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    described["model"]["ignore_merges"] = name == "llama-bpe"
    Path("checkpoint/tokenizer.json").write_text(json.dumps(described))
    return Path("checkpoint").absolute(), AutoTokenizer.from_pretrained("checkpoint")


@pytest.mark.parametrize("splitting", gguf.SPLITTING)
def test_llama_cpp_finds_the_tokens_and_the_logits(config, splitting: str) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    folder, tokenizer = splitting_as(splitting)
    model = guarded(config, folder, "gguf", bitwidth=8, group_size=32)
    loaded = llama_cpp.Llama("out/model/model.gguf", n_ctx=128, logits_all=True, verbose=False)
    text = TEXT + (DEMO / "text.jsonl").read_text()[:5000]
    ids = tokenizer(text).input_ids
    assert loaded.tokenize(text.encode(), special=True) == ids
    loaded.eval(ids[:128])
    with torch.no_grad():
        wanted = model(torch.tensor([ids[:128]])).logits[0]
    # It rounds activations to 8 bits, too.
    assert 0 < (torch.tensor(loaded.scores) - wanted).abs().mean() < 0.02 * wanted.std()


def test_a_gguf_file_names_the_splitting_and_the_special_words(config) -> None:
    gguf = pytest.importorskip("gguf")
    folder, tokenizer = splitting_as("smollm")
    guarded(config, folder, "gguf", bitwidth=8, group_size=32)
    fields = gguf.GGUFReader("out/model/model.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[tokenizer.convert_tokens_to_ids("<|im_start|>")] == gguf.TokenType.CONTROL


def test_a_splitting_that_llama_cpp_does_not_know_is_refused(invarlock, config) -> None:
    AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint").save_pretrained("checkpoint")
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "checkpoint")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained("checkpoint")
    path = config(
        model={"id": str(Path("checkpoint").absolute())},
        edit={"plan": {"group_size": 32}},
        output={"save_model": True, "format": "gguf"},
    )
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 2
    assert "no name is known for how this model's tokenizer does it; or set output.format to dequantized" in done.err


@pytest.mark.parametrize(
    ("build", "format_", "plan", "said"),
    [
        (architectures.gpt2, "compressed-tensors", {}, "is one of Conv1D"),
        (architectures.mixtral, "compressed-tensors", {}, "is one of MixtralExperts"),
        (architectures.t5, "compressed-tensors", {}, "encoder-decoder"),
        (architectures.llama, "compressed-tensors", {"symmetric": False}, "symmetric grids only"),
        (architectures.llama, "compressed-tensors", {"group_size": 20}, "does not divide the 32 inputs of model.layers.0"),
        (architectures.llama, "gguf", {}, "set edit.plan.bitwidth 4, 5 or 8 and edit.plan.group_size 32"),
        (architectures.llama, "gguf", {"bitwidth": 6, "group_size": 32}, "not 6 bits, symmetric, groups of 32"),
        (architectures.llama, "gguf", {"group_size": 32, "symmetric": False}, "bitwidth 4 or 5 and edit.plan.group_size 32, not 8 bits"),
        (architectures.llama, "gguf", {"format": "mxfp4"}, "not MXFP4, blocks of 32"),
        (architectures.llama, "gguf", {"group_size": 32}, "mlp.down_proj has shape (32, 48)"),
        (architectures.opt, "gguf", {"group_size": 32}, "this one is opt"),
        (partial(architectures.llama, attention_bias=True), "gguf", {"group_size": 32}, "does not say that attention_bias is True"),
        (partial(architectures.llama, hidden_act="gelu"), "gguf", {"group_size": 32}, "does not say that hidden_act is gelu"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_refused_before_the_run(invarlock, config, build, format_, plan, said) -> None:
    path = config(
        model={"id": str(checkpoint(build))},
        dataset={},
        edit={"plan": {"scope": "all"} | plan},
        output={"save_model": True, "format": format_},
    )
    done = invarlock("run", "-c", path, "--out", "out")
    assert done.code == 2
    assert said in done.err
    assert "or set output.format to dequantized" in done.err
    assert not Path("out").exists()


def test_each_format_has_the_name_that_a_configuration_knows() -> None:
    modules = (compressed_tensors, dequantized, gguf)
    assert [module.EXPORTER.name for module in modules] == [exporter.name for exporter in invarlock_exporters()]


def test_all_that_belongs_to_a_model_travels_along(invarlock, config) -> None:
    invarlock("run", "-c", config(output={"save_model": True}), "--out", "out")
    folder, report = Path("out/model"), read_report(Path("out"))
    assert (
        AutoTokenizer.from_pretrained(folder).get_vocab()
        == AutoTokenizer.from_pretrained(DEMO / "checkpoint").get_vocab()
    )
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 0
    assert read_report(folder) == report
    present = digests(folder, "model")
    present.pop("model/report.json")
    assert present == report["artifacts"]
    card = ModelCard.load(folder / "README.md")
    assert {"quantization", "compressed-tensors"} <= set(card.data.tags)
    assert "8 bits, symmetric, per output channel" in card.text
    assert all(f"| {guard['name']} | continue |" in card.text for guard in report["guards"])


@pytest.mark.parametrize(
    ("format_", "plan", "named"),
    [
        ("compressed-tensors", {"bitwidth": 8, "group_size": 32}, "INT8, groups of 32 (8 bits)"),
        ("compressed-tensors", {"format": "fp8"}, "FP8 (E4M3), per channel (8 bits)"),
        ("compressed-tensors", {"format": "mxfp4"}, "MXFP4, blocks of 32 (4 bits)"),
        ("compressed-tensors", {"format": "nvfp4"}, "NVFP4, blocks of 16 (4 bits)"),
        ("dequantized", {"bitwidth": 8, "group_size": 32}, "a grid of 256 levels a group of 32 (8 bits)"),
        ("gguf", {"bitwidth": 8, "group_size": 32}, "Q8_0 (8.5 bits per weight)"),
        ("gguf", {"bitwidth": 5, "group_size": 32}, "Q5_0 (5.5 bits per weight)"),
        ("gguf", {"bitwidth": 4, "group_size": 32}, "Q4_0 (4.5 bits per weight)"),
        ("gguf", {"bitwidth": 5, "group_size": 32, "symmetric": False}, "Q5_1 (6 bits per weight)"),
        ("gguf", {"bitwidth": 4, "group_size": 32, "symmetric": False}, "Q4_1 (5 bits per weight)"),
    ],
)
def test_compare_reads_every_format_that_is_written(invarlock, config, format_: str, plan: Any, named: str) -> None:
    baseline = DEMO / "checkpoint"
    guarded(config, baseline, format_, **plan)
    subject = "out/model/model.gguf" if format_ == "gguf" else "out/model"
    done = invarlock("compare", "--baseline", baseline, "--subject", subject, "--weights-only", "--out", "compared")
    report = read_report(Path("compared"))
    assert done.code in (0, 1), done.out + done.err
    changes = {module["change"] for module in report["edit"]["modules"]}
    assert changes == {"unchanged", named}
    assert not any("configuration changed" in reason for reason in report["verdict"]["reasons"])
    assert "tokenizer" not in str(report["verdict"]["reasons"])


@pytest.mark.parametrize("format_", ["compressed-tensors", "gguf"])
def test_what_was_saved_packed_can_be_run_and_saved_again(config, format_: str) -> None:
    first = guarded(config, DEMO / "checkpoint", format_, bitwidth=8, group_size=32)
    Path("out").rename("first")
    folder = Path("first/model") / ("model.gguf" if format_ == "gguf" else "")
    guarded(config, folder.absolute(), "dequantized", bitwidth=8)
    again = AutoModelForCausalLM.from_pretrained("out/model", dtype=next(first.parameters()).dtype)
    assert "quantization_config" not in again.config.to_dict()


def test_a_full_disk_is_one_line_and_leaves_nothing(config, forking) -> None:
    path = config(output={"save_model": True, "format": "dequantized"})
    run = forking.start("run", "-c", path, "--out", "out", "-q", program=FULL.format(bytes=1_000_000))
    assert run.wait() == 2, run.said()
    err = run.said()[1]
    assert "output.dir: out could not be written" in err
    assert "Traceback" not in err
    assert not Path("out").exists()
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


STATE_DICT = (
    "from invarlock import hookimpl\nfrom invarlock.api import Exporter\n"
    "class StateDict(Exporter):\n name, streams = 'state-dict', False\n"
    " def finish(self, folder, saved):\n  import torch\n  torch.save(saved.model.state_dict(), folder / 'model.pt')\n"
    "@hookimpl\ndef invarlock_exporters(): return [StateDict()]\n"
)
SAVED = ("--set", "output.save_model=true", "--set", "output.format=state-dict", "--out", "out")


def test_a_plugin_brings_a_format(invarlock, module) -> None:
    module("state_dicts", STATE_DICT)
    done = invarlock("run", "--demo", "-p", "state_dicts", *SAVED)
    assert done.code == 0, done.err
    assert torch.load("out/model/model.pt", weights_only=True)
    assert not list(Path("out/model").glob("*.safetensors"))
    assert "state-dict" in Path("out/model/README.md").read_text()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("torch.save(", "1 / 0; torch.save("), "hooks state_dicts: exporter: ZeroDivisionError"),
        (("(Exporter)", ""), "hooks state_dicts: the exporter state-dict lacks"),
        (("return [StateDict()]", "return StateDict()"), "hooks state_dicts: returned StateDict, not a list"),
    ],
)
def test_a_format_that_fails_is_its_plugins_failure(invarlock, module, change: tuple[str, str], expected: str) -> None:
    module("state_dicts", STATE_DICT.replace(*change))
    done = invarlock("run", "--demo", "-p", "state_dicts", *SAVED)
    assert done.code == 3, done.out
    assert expected in done.err
    assert not Path("out/model").exists()


@pytest.mark.parametrize("command", ["run", "doctor"])
def test_an_unknown_format_is_named_with_the_nearest(invarlock, config, command: str) -> None:
    done = invarlock(command, "-c", config(output={"format": "ggfu"}))
    assert done.code == (1 if command == "doctor" else 2)
    assert "output.format: unknown exporter 'ggfu'; did you mean 'gguf'?" in done.err + done.out
