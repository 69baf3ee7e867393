"""Checkpoints that others packed: read tensor by tensor, named, judged and counted; each row of docs/formats.md."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import packed_checkpoints
import pytest
import torch
from conftest import read_report, slow
from packed_checkpoints import BASE, BLOCKS, HOW, MIXED, SCHEMES, changed, compressed, in_gguf, packed_as
from transformers import AutoConfig, AutoModelForCausalLM

from invarlock.adapters import HF_Causal_Adapter
from invarlock.core.lazy import LazyTensor
from plugins_builtin.adapters.gguf import HF_GGUF_Adapter

ALIKE = (
    "fp8-tensor",
    "fp8-static-activations",
    "nvfp4-activations",
    "mxfp6",
    "mxfp8",
    "int8-activations",
    "int3-group",
)
"""Schemes of compressed-tensors of which another one of their sort is tried."""
LIKE_OTHERS = (
    "modelopt-fp8",
    "modelopt-int4",
    "modelopt-int8",
    "modelopt-mxfp8",
    "auto-round-awq",
    "nf4",
    "mlx-8",
    "gptq_v2",
    "torchao-int8",
    "torchao-fp8",
)
"""Other layouts of which another one of their sort is tried."""
METHODS = [*(name for name in HOW if name not in LIKE_OTHERS), *slow(*LIKE_OTHERS)]
OF_EACH_SORT = ("Q4_1", "Q4_K", "Q6_K", "IQ2_XS", "IQ4_NL", "TQ2_0", "MXFP4")
"""Types of GGUF: with and without a minimum, in super-blocks, by codebooks, ternary, and of small floats."""
# Of compressed-tensors, on import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

NAMED = {
    "fp8-tensor": "FP8 (E4M3), per tensor (8 bits)",
    "fp8-channel": "FP8 (E4M3), per channel (8 bits)",
    "fp8-block": "FP8 (E4M3), blocks of 16 x 24 (8 bits)",
    "fp8-static-activations": "FP8 (E4M3), per tensor (8 bits)",
    "fp8-dynamic-activations": "FP8 (E4M3), per channel (8 bits)",
    "nvfp4": "NVFP4, blocks of 16 (4 bits)",
    "nvfp4-activations": "NVFP4, blocks of 16 (4 bits)",
    "mxfp4": "MXFP4, blocks of 32 (4 bits)",
    "mxfp6": "MXFP6, blocks of 32 (6 bits)",
    "mxfp8": "MXFP8, blocks of 32 (8 bits)",
    "int8-channel": "INT8, per channel (8 bits)",
    "int8-activations": "INT8, per channel (8 bits)",
    "int4-group": "INT4, groups of 16 (4 bits)",
    "int4-asymmetric": "INT4, asymmetric, groups of 16 (4 bits)",
    "int3-group": "INT3, groups of 32 (3 bits)",
    "gptq": "INT4, asymmetric, groups of 32 (4 bits)",
    "gptq_v2": "INT4, asymmetric, groups of 32 (4 bits)",
    "gptq-8": "INT8, asymmetric, groups of 64 (8 bits)",
    "gptq-channel": "INT4, asymmetric, per channel (4 bits)",
    "awq": "INT4, asymmetric, groups of 32 (4 bits)",
    "mlx": "INT4, asymmetric, groups of 32 (4 bits)",
    "mlx-8": "INT8, asymmetric, groups of 64 (8 bits)",
    "fp8": "FP8 (E4M3), blocks of 32 x 32 (8 bits)",
    "nf4": "NF4, blocks of 64 (4 bits)",
    "nf4-nested": "NF4, blocks of 64 (4 bits)",
    "llm-int8": "INT8, per channel (8 bits)",
    "gptq-3": "INT3, asymmetric, groups of 32 (3 bits)",
    "modelopt-fp8": "FP8 (E4M3), per tensor (8 bits)",
    "modelopt-fp8-block": "FP8 (E4M3), blocks of 64 x 32 (8 bits)",
    "modelopt-nvfp4": "NVFP4, blocks of 16 (4 bits)",
    "modelopt-int8": "INT8, per channel (8 bits)",
    "modelopt-mxfp8": "MXFP8, blocks of 32 (8 bits)",
    "modelopt-int4": "INT4, groups of 32 (4 bits)",
    "auto-round": "INT4, asymmetric, groups of 32 (4 bits)",
    "auto-round-awq": "INT4, asymmetric, groups of 32 (4 bits)",
    "torchao-int8": "INT8, per channel (8 bits)",
    "torchao-int4": "INT4, asymmetric, groups of 32 (4 bits)",
    "torchao-fp8": "FP8 (E4M3), per channel (8 bits)",
}


def loaded(folder: str, **options: Any) -> torch.nn.Module:
    return HF_Causal_Adapter().load_model(folder, "cpu", **options)


def compared(invarlock: Any, *options: str, code: int = 0) -> Any:
    """The report of a comparison of ``packed`` with what it was made of."""
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--out", "out", "--weights-only", *options)
    assert done.code == code, done.out + done.err
    return read_report(Path("out"))


def changes_in(report: Any) -> set[str]:
    return {module["change"] for module in report["edit"]["modules"]} - {"unchanged"}


@pytest.mark.parametrize("scheme", [*(name for name in SCHEMES if name not in ALIKE), *slow(*ALIKE)])
def test_compressed_tensors_are_read_as_its_library_reads_them_and_named(invarlock, scheme: str) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES[scheme]})
    config = AutoConfig.from_pretrained("packed")
    config.quantization_config["dequantize"] = True
    wanted = AutoModelForCausalLM.from_pretrained("packed", config=config)
    found = loaded("packed")
    assert "quantization_config" not in found.config.to_dict()
    assert all(map(torch.equal, found.parameters(), wanted.parameters()))
    assert changes_in(compared(invarlock)) == {NAMED[scheme]}


@pytest.mark.parametrize("method", METHODS)
def test_other_layouts_are_read_as_the_weights_that_they_stand_for_and_named(invarlock, method: str) -> None:
    wanted = packed_as(method, Path("packed"))
    found = {name: parameter.float() for name, parameter in loaded("packed").named_parameters() if name in wanted}
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-3, atol=1e-7) for name in wanted)
    report = compared(invarlock)
    assert NAMED[method] in changes_in(report)
    assert sum(module["bits"] is not None for module in report["edit"]["modules"]) == 7
    # What the configuration declares is in the files.
    assert report["verdict"]["reasons"] == []


@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_model_is_the_loaded_one(method: str) -> None:
    packed_as(method, Path("packed"))
    streamed, whole = loaded("packed", stream=True), loaded("packed")
    for name, parameter in streamed.named_parameters():
        assert isinstance(parameter, LazyTensor)
        assert torch.equal(parameter.detach().whole(), whole.get_parameter(name)), name


@pytest.mark.parametrize(("data_type", "bits", "scheme"), [("nv_fp", 4, "nvfp4"), ("mx_fp", 4, "mxfp4")])
def test_auto_round_can_pack_as_compressed_tensors(invarlock, data_type: str, bits: int, scheme: str) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES[scheme]})
    path = Path("packed/config.json")
    how = {"quant_method": "auto-round", "packing_format": "auto_round:llm_compressor", "data_type": data_type}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": how | {"bits": bits}}))
    assert changes_in(compared(invarlock)) == {NAMED[scheme]}


def test_groups_of_modules_can_have_schemes_of_their_own(invarlock) -> None:
    compressed(Path("packed"), MIXED)
    report = compared(invarlock)
    assert changes_in(report) == {NAMED["fp8-channel"], NAMED["int4-group"]}
    types = {each["format"]: each["bits_per_weight"] for each in report["storage"]["after"]["types"]}
    # A scale of 16 bits for 32 inputs; for 16 inputs, and two numbers of 64 bits for the shape of a matrix of 2048.
    assert types == {"FP8 (E4M3), per channel": 8.5, "INT4, groups of 16": 5 + 128 / 2048, "BF16": 16}


def test_a_packed_baseline_is_measured_and_compared_with(invarlock) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["nvfp4"]})
    options = ("--set", "dataset.seq_len=16", "--set", "dataset.preview_n=1", "--set", "dataset.final_n=2")
    done = invarlock("compare", "--baseline", "packed", "--subject", "packed", "--generated", "--out", "out", *options)
    assert done.code == 0, done.err
    report = read_report(Path("out"))
    assert not changes_in(report)
    assert report["metrics"]["primary"]["ratio"] == 1


def test_a_packed_checkpoint_is_rounded_while_it_is_streamed(invarlock, config) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-channel"]})
    path = config(
        model={"id": "packed", "device": "cpu"},
        edit={"plan": {"bitwidth": 8}},
        output={"save_model": True, "format": "dequantized"},
    )
    saved = {}
    for options in ((), ("--stream",)):
        done = invarlock("run", "-c", path, "--out", "out", "--force", "--set", "dataset.provider=generated", *options)
        assert done.code == 0, done.err
        saved[options] = AutoModelForCausalLM.from_pretrained("out/model")
        assert not hasattr(saved[options].config, "quantization_config")
    assert all(map(torch.equal, *(model.parameters() for model in saved.values())))


def test_storage_is_reported_before_and_after(invarlock) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["mxfp4"]})
    storage = compared(invarlock)["storage"]
    assert storage["before"]["bits_per_weight"] == 16
    for side, folder in (("before", BASE), ("after", "packed")):
        assert storage[side]["file_bytes"] == Path(folder, "model.safetensors").stat().st_size
    first = storage["after"]["types"][0]
    assert (first["format"], first["bits_per_weight"]) == ("MXFP4, blocks of 32", 4.25)
    assert first["share"] == pytest.approx(first["parameters"] / storage["after"]["parameters"])
    shown = invarlock("report", "out").out
    assert f"16 -> {storage['after']['bits_per_weight']:.4g} bits per weight, scales counted" in shown
    assert "% MXFP4, blocks of 32" in shown


def test_a_report_of_named_formats_verifies(invarlock) -> None:
    compressed(Path("packed"), {"Linear": SCHEMES["nvfp4"]})
    compared(invarlock)
    assert invarlock("verify", "out").code == 0


def test_what_was_not_rounded_is_not_named_by_the_format(invarlock) -> None:
    """A weight that was zeroed besides stays what it is called."""
    compressed(Path("packed"), {"Linear": SCHEMES["fp8-channel"]})
    changed(Path("packed"), "0.mlp.down_proj.weight", lambda weight: (weight.float() * 0).to(weight.dtype))
    found = changes_in(compared(invarlock))
    assert NAMED["fp8-channel"] in found
    assert any("zero" in change for change in found)


def scale(value: float) -> Any:
    return lambda scales: torch.full_like(scales.float(), value).to(scales.dtype)


BROKEN = {
    "a scale of zero": (SCHEMES["fp8-channel"], ".weight_scale", scale(0), "holds scales that are zero"),
    "a scale that is NaN": (SCHEMES["int4-group"], ".weight_scale", scale(float("nan")), "scales that are not finite"),
    "NaN as E8M0": ("MXFP4A16", ".weight_scale", lambda scales: scales.fill_(255), "holds scales that are NaN"),
    "a factor of zero": ("NVFP4A16", ".weight_global_scale", scale(0), "holds scales that are zero"),
    "scales of too few rows": (SCHEMES["fp8-channel"], ".weight_scale", lambda scales: scales[1:], "has shape (31, 1), and "),
    "scales of too few blocks": ("MXFP4A16", ".weight_scale", lambda scales: scales[:, :1], "needs (32, 2)"),
    "zero points of other groups": (SCHEMES["int4-asymmetric"], ".weight_zero_point", lambda zeros: zeros[:, 1:], "needs (32, 4) or (4, 4)"),
    "too few words": (SCHEMES["int4-group"], ".weight_packed", lambda packed: packed[:, 1:], "does not hold (32, 64)"),
    "too few bytes": ("NVFP4A16", ".weight_packed", lambda packed: packed[:, 8:], "needs (32, 3)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("side", ["--subject", "--baseline"])
def test_broken_packing_is_one_line(invarlock, case: str, side: str) -> None:
    scheme, part, change, said = BROKEN[case]
    compressed(Path("packed"), {"Linear": scheme})
    name = changed(Path("packed"), part, change)
    other = "--baseline" if side == "--subject" else "--subject"
    done = invarlock("compare", side, "packed", other, BASE, "--out", "out", "--weights-only")
    assert done.code == 2
    (line,) = (line for line in done.err.splitlines() if "error" in line)
    assert name.rpartition(".")[0] in line
    assert said in line
    assert "Traceback" not in done.err


WORDS = {
    "a scale of zero": ("gptq", ".scales", scale(0), "holds scales that are zero"),
    "scales of other groups": ("awq", ".scales", lambda scales: scales[1:], "needs (8, 128)"),
    "zero points of other groups": ("gptq", ".qzeros", lambda zeros: zeros[1:], "needs (8, 16)"),
    "an order of other inputs": ("gptq", ".g_idx", lambda index: index[1:], "needs (256,)"),
    "biases of other groups": ("mlx", ".biases", lambda biases: biases[:, 1:], "needs (128, 8)"),
    "a factor of zero": ("modelopt-nvfp4", ".weight_scale_2", scale(0), "holds scales that are zero"),
    "scales of too few blocks": ("modelopt-nvfp4", ".weight_scale", lambda scales: scales[:, 1:], "needs (128, 16)"),
    "too few columns": ("modelopt-int4", ".down_proj.weight", lambda packed: packed[:, 1:], "needs (128, 9)"),
    "a bias that is NaN": ("mlx", ".biases", scale(float("nan")), ".biases holds numbers that are not finite"),
    "scales of groups that do not fit": (
        "modelopt-int4",
        ".weight_scale",
        lambda scales: scales[:, 1:],
        "needs (128, 8)",
    ),
    "codes without scales": (
        "fp8",
        ".weight_scale_inv",
        None,
        "is stored as codes (torch.float8_e4m3fn), and its scales are missing",
    ),
    "zero points that are no words": (
        "awq",
        ".qzeros",
        lambda zeros: zeros.float(),
        "stored as torch.float32, not as words",
    ),
    "a nested scale that is NaN": ("nf4-nested", ".nested_absmax", scale(float("nan")), "scales that are not finite"),
    "scales of too few 64s": ("nf4", ".weight.absmax", lambda scales: scales[1:], "needs (512,)"),
    "too few halves": (
        "nf4",
        ".down_proj.weight",
        lambda codes: codes[1:],
        "does not hold (128, 256) numbers of 4 bits",
    ),
    "a shape that is none": ("nf4", "__nf4", lambda state: state[1:], "does not describe the weight"),
    "scales of too few rows": ("llm-int8", ".SCB", lambda scales: scales[1:], "needs (128,)"),
    "scales of other groups of torchao": (
        "torchao-int4",
        "_weight_scale",
        lambda scales: scales[:, 1:],
        "needs (128, 8)",
    ),
    "a scale of zero in torchao": (
        "torchao-fp8",
        "_weight_scale",
        scale(0),
        "down_proj._weight_scale holds scales that are zero",
    ),
    "codes of another type": (
        "torchao-int8",
        "_weight_qdata",
        lambda codes: codes.float(),
        "_weight_qdata is not a matrix of such codes",
    ),
    "scales of other blocks": ("fp8", ".weight_scale_inv", lambda scales: scales[1:], "needs (4, 8)"),
}


@pytest.mark.parametrize("case", WORDS)
def test_broken_words_are_one_line(invarlock, case: str) -> None:
    method, part, change, said = WORDS[case]
    packed_as(method, Path("packed"))
    changed(Path("packed"), part, change)
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--out", "out", "--weights-only")
    assert done.code == 2
    assert said in done.err.splitlines()[-1]


def test_an_order_that_points_nowhere_is_one_line(invarlock) -> None:
    packed_as("gptq", Path("packed"))
    changed(Path("packed"), ".g_idx", lambda index: index + 100)
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--out", "out", "--weights-only")
    assert done.code == 2
    assert "mlp.down_proj.weight cannot be unpacked: IndexError" in done.err.splitlines()[-1]


def described(**changes: Any) -> None:
    path = Path("packed/config.json")
    settings = json.loads(path.read_text())
    settings["quantization_config"] |= changes
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 5}, "quantization_config.bits is 5; only 2 or 3 or 4 or 8 can be unpacked"),
        ({"quant_method": "auto-round", "packing_format": "exl3"}, "packing_format is 'exl3', which is not known"),
        ({"quant_method": "awq", "version": "gemv"}, "packed by awq in version gemv; only gemm can be unpacked"),
        ({"quant_method": "gtpq"}, "unknown method 'gtpq'"),
    ],
)
def test_a_layout_that_cannot_be_unpacked_is_one_line(invarlock, changes: dict[str, Any], said: str) -> None:
    packed_as("gptq", Path("packed"))
    described(**changes)
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--out", "out", "--weights-only")
    assert done.code == 2
    assert said in done.err.splitlines()[-1]


@pytest.mark.parametrize("method", ["hqq", "torchao"])
def test_what_reads_packed_weights_is_named_where_it_is_missing(invarlock, monkeypatch, method: str) -> None:
    monkeypatch.setitem(sys.modules, method, None)
    packed_as("gptq", Path("packed"))
    described(quant_method=method)
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--weights-only", "--out", "out")
    assert done.code == 2
    todo = f"pip install 'invarlock[{method}]', which brings {method}"
    said = f"invarlock: error: subject: packed: its weights are packed by {method}; to unpack them: {todo}"
    assert done.err.splitlines()[-1] == said
    assert not Path("out").exists()


def test_the_table_names_what_is_read() -> None:
    page = (Path(packed_checkpoints.__file__).parent.parent / "docs" / "formats.md").read_text()
    for scheme in (*SCHEMES, *HOW):
        assert f"`{scheme}`" in page, scheme


@pytest.mark.parametrize("kind", [*OF_EACH_SORT, *slow(*(kind for kind in BLOCKS if kind not in OF_EACH_SORT))])
def test_each_type_of_gguf_is_read_and_named_with_its_bits_a_weight(invarlock, kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    wanted = in_gguf(kind, Path("packed.gguf"))
    found = dict(HF_GGUF_Adapter().load_model("packed.gguf", "cpu").named_parameters())
    # Those of queries and keys are in another order.
    for theirs, ours in (("blk.0.ffn_down", "mlp.down_proj"), ("blk.0.attn_v", "self_attn.v_proj")):
        assert torch.equal(found[f"model.layers.0.{ours}.weight"], wanted[f"{theirs}.weight"])
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed.gguf", "--out", "out", "--weights-only")
    assert done.code in (0, 1), done.err
    report = read_report(Path("out"))
    size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert changes_in(report) == {f"{kind} ({8 * nbytes / size:.5g} bits per weight)"}
    types = {each["format"]: each["bits_per_weight"] for each in report["storage"]["after"]["types"]}
    assert types == {kind: 8 * nbytes / size, "F32": 32}
    assert invarlock("verify", "out").code == 0


def test_a_scale_of_gguf_that_is_not_finite_is_one_line(invarlock) -> None:
    gguf = pytest.importorskip("gguf")
    in_gguf("Q4_0", Path("packed.gguf"))
    stored = bytearray(Path("packed.gguf").read_bytes())
    tensor = next(each for each in gguf.GGUFReader("packed.gguf").tensors if each.name == "blk.0.ffn_down.weight")
    # A block of Q4_0 begins with its scale; this is NaN in float16.
    stored[tensor.data_offset : tensor.data_offset + 2] = b"\x00\x7e"
    Path("broken.gguf").write_bytes(stored)
    done = invarlock("compare", "--baseline", BASE, "--subject", "broken.gguf", "--out", "out", "--weights-only")
    assert done.code == 2
    said = "invarlock: error: subject: broken.gguf: blk.0.ffn_down.weight holds scales that are not finite"
    assert done.err.splitlines()[-1] == said


def test_a_file_whose_library_is_missing_names_it(invarlock, config, monkeypatch) -> None:
    def absent(name: str) -> Any:
        if name == "gguf":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    version = metadata.version
    monkeypatch.setattr(metadata, "version", absent)
    Path("some.gguf").write_bytes(b"GGUF")
    done = invarlock("run", "-c", config(model={"id": "some.gguf"}), "--out", "out")
    assert done.code == 2
    assert "hf_gguf needs gguf: pip install 'invarlock[gguf]'" in done.err
    assert done.err.count("\n") == 1
