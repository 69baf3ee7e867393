"""Experts that are packed one by one or fused: read, named as the model has them, and counted in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import read_report, slow
from packed_checkpoints import BASE, HOW, changed, packed_as
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from invarlock import api
from invarlock.adapters import HF_Causal_Adapter
from invarlock.core.lazy import LazyTensor
from invarlock.testing import architectures
from plugins_builtin.adapters.hf import _fits

# Of compressed-tensors, on import.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def stored(model: Any, packing: dict[str, Any], pack: Any) -> None:
    """A model in ``BASE``, and beside it what ``pack`` makes of each of its tensors."""
    model.save_pretrained(BASE)
    model.save_pretrained("packed")
    path = Path("packed/model.safetensors")
    parts = [pack(name, tensor) for name, tensor in load_file(path).items()]
    save_file({name: tensor for part in parts for name, tensor in part.items()}, path, {"format": "pt"})
    config = Path("packed/config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": packing}))


def fp8(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if ".experts." not in name:
        return {name: tensor}
    scale = tensor.abs().max() / 448
    return {name: (tensor / scale).to(torch.float8_e4m3fn), name.replace(".weight", ".weight_scale"): scale}


def mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    if not name.endswith(("gate_up_proj", "down_proj")):
        return {name: tensor}
    blocks = tensor.float().mT.unflatten(2, (-1, 32))
    exponents = blocks.abs().amax(-1).log2().floor() - 2
    quotients = blocks / 2 ** exponents.unsqueeze(-1)
    codes = ((quotients.abs().unsqueeze(-1) - E2M1).abs().argmin(-1) + 8 * (quotients < 0)).byte()
    return {f"{name}_blocks": codes[..., ::2] | codes[..., 1::2] << 4, f"{name}_scales": (exponents + 127).byte()}


def named(invarlock: Any) -> dict[str, str]:
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--out", "out", "--weights-only")
    assert done.code == 0, done.out + done.err
    modules = read_report(Path("out"))["edit"]["modules"]
    return {module["name"]: module["change"] for module in modules if module["change"] != "unchanged"}


def test_experts_stored_one_by_one_are_named_where_the_model_has_them_fused(invarlock) -> None:
    stored(architectures.mixtral(), HOW["modelopt-fp8"], fp8)
    experts = "model.layers.{}.mlp.experts.{}"
    fused = [experts.format(layer, name) for layer in range(2) for name in ("gate_up_proj", "down_proj")]
    assert named(invarlock) == dict.fromkeys(fused, "FP8 (E4M3), per tensor (8 bits)")


def test_experts_of_gpt_oss_are_read_as_transformers_reads_them_and_named(invarlock) -> None:
    stored(architectures.gpt_oss(intermediate_size=32).bfloat16(), {"quant_method": "mxfp4"}, mxfp4)
    wanted = AutoModelForCausalLM.from_pretrained("packed", quantization_config=Mxfp4Config(dequantize=True))
    adapter = HF_Causal_Adapter()
    assert all(map(torch.equal, adapter.load_model("packed", "cpu").parameters(), wanted.parameters()))
    for parameter, theirs in zip(
        adapter.load_model("packed", "cpu", stream=True).parameters(), wanted.parameters(), strict=True
    ):
        assert isinstance(parameter, LazyTensor)
        assert torch.equal(parameter.detach().whole(), theirs)
    assert set(named(invarlock).values()) == {"MXFP4, blocks of 32 (4 bits)"}


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("_scales", lambda scales: scales[:, 1:], "needs (4, 32, 1)"),
        *slow(
            ("_scales", lambda scales: scales.fill_(255), "holds scales that are NaN"),
            ("_blocks", lambda blocks: blocks.flatten(2), "is not (experts, out, blocks, 16) bytes"),
        ),
    ],
)
def test_broken_experts_are_one_line(invarlock, part: str, change: Any, said: str) -> None:
    stored(architectures.gpt_oss(intermediate_size=32).bfloat16(), {"quant_method": "mxfp4"}, mxfp4)
    changed(Path("packed"), part, change)
    done = invarlock("compare", "--baseline", BASE, "--subject", "packed", "--out", "out", "--weights-only")
    assert done.code == 2
    assert said in done.err.splitlines()[-1]


def test_room_is_counted_for_the_weights_that_codes_become(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four bits in the file, sixteen in memory."""
    packed_as("gptq", Path("packed"))
    weights = sum(tensor.nbytes for tensor in HF_Causal_Adapter().load_model("packed", "cpu").parameters())
    assert Path("packed/model.safetensors").stat().st_size < 0.8 * weights
    for share, fits in ((0.9, False), (1.5, True)):
        monkeypatch.setattr(api, "free_memory", lambda share=share: 2 * share * weights, raising=False)
        assert _fits(transformers.AutoModelForCausalLM, "packed", "cpu", {}, sharing=2) is fits
