"""Saving an accepted model: weights in a format that others load, and all that has to travel along with them."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from invarlock.checkpoints.soundness import INDEX, SINGLE
from invarlock.core.errors import UsageError
from invarlock.core.progress import watched
from invarlock.core.text import markdown
from invarlock.exporters import compressed_tensors, gguf
from invarlock.quantization.scheme import Scheme
from invarlock.quantization.selection import WeightTarget

Format = Literal["compressed-tensors", "dequantized", "gguf"]


@dataclass
class Export:
    """How a model is saved, if it is accepted."""

    format: Format
    scheme: Scheme
    source: str
    """The id of the baseline."""
    scales: dict[str, Tensor] = field(default_factory=dict)
    """Of each weight as it is quantized, by the name of the parameter; not needed where codes are not stored."""

    def check(self, model: nn.Module, targets: Sequence[WeightTarget], tokenizer: Any) -> None:
        """Refuse, before the run starts, what the format cannot hold.

        :raises UsageError: with the reason, and what to use instead.
        """
        reason = None
        if self.format == "compressed-tensors":
            reason = compressed_tensors.refusal(self.scheme, targets, model)
        elif self.format == "gguf":
            reason = gguf.refusal(self.scheme, targets, model, tokenizer)
        if reason:
            raise UsageError(f"output.format: {self.format}: {reason}; or set output.format to dequantized")

    def write(self, folder: Path, model: Any, tokenizer: Any, report: Mapping[str, Any]) -> None:
        """Write the model, its tokenizer, its configurations and its card to an empty folder."""
        with watched(folder, self._size_of(model)):
            if self.format == "compressed-tensors":
                compressed_tensors.save(folder, model, self.scheme, self.scales)
            elif self.format == "dequantized":
                model.save_pretrained(folder, max_shard_size=_shard_size(self.source))
            self._accompany(folder, model, tokenizer, report)
            if self.format == "gguf":
                gguf.save(folder, model, tokenizer, self.scales)

    def _size_of(self, model: nn.Module) -> int:
        """About how many bytes its weights will take."""
        bits = dict.fromkeys(self.scales, self.scheme.bitwidth)
        return sum(
            parameter.numel() * bits.get(name, 8 * parameter.element_size()) // 8
            for name, parameter in model.named_parameters()
        )

    def stored(self, name: str, weight: Tensor, scale: Tensor | None) -> dict[str, Tensor]:
        """What is stored of one weight, by name, where weights are written one by one.

        :param scale: of a quantized weight.
        """
        if scale is None or self.format == "dequantized":
            return {name: weight}
        return compressed_tensors.pack(name, weight, scale, self.scheme)

    def complete(
        self, folder: Path, model: Any, tokenizer: Any, report: Mapping[str, Any], quantized: Container[str]
    ) -> None:
        """Add to a folder of weights that were written one by one all that is not weights.

        :param quantized: the names of the parameters that were.
        """
        self._accompany(folder, model, tokenizer, report)
        if self.format == "compressed-tensors":
            compressed_tensors.configure(folder, model, self.scheme, quantized)

    def _accompany(self, folder: Path, model: Any, tokenizer: Any, report: Mapping[str, Any]) -> None:
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not (folder / "config.json").exists():
            model.config.save_pretrained(folder)
            if getattr(model, "generation_config", None):
                model.generation_config.save_pretrained(folder)
        _write_card(folder, self, report)

    @property
    def stores_codes(self) -> bool:
        return self.format != "dequantized"

    @property
    def described(self) -> str:
        scheme = self.scheme
        grain = f"groups of {scheme.group_size}" if scheme.group_size else "per output channel"
        grain = grain if scheme.per_channel else "per tensor"
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        return f"{scheme.bitwidth} bits, {kind}, {grain}, {self.format}"


def _shard_size(source: str) -> int | str:
    """The size of the largest shard of the input, so that the output is cut as the input was; else one file."""
    index = Path(source) / INDEX
    if not index.is_file() or (Path(source) / SINGLE).is_file():
        return "1000TB"
    files: set[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return max((Path(source) / file).stat().st_size for file in files)


def _write_card(folder: Path, export: Export, report: Mapping[str, Any]) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="gguf" if export.format == "gguf" else "transformers",
        base_model=None if Path(export.source).exists() else export.source,
        base_model_relation=None if Path(export.source).exists() else "quantized",
        tags=["quantization", "round-to-nearest", "invarlock", export.format],
    )
    verdict, primary = report["verdict"], report["metrics"]["primary"]
    facts = {
        "verdict": f"accepted ({verdict['action']}), {verdict['decided_by']}",
        "rests on": verdict["rests_on"],
        **({primary["kind"].replace("_", " "): primary["message"]} if primary else {}),
    }
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        name=markdown(Path(export.source).stem if Path(export.source).exists() else export.source),
        what=export.described,
        weights=len(report["edit"]["modules"]),
        version=report["invarlock_version"],
        facts=[(name, markdown(fact)) for name, fact in facts.items()],
        guards=[(markdown(guard["name"]), _said(guard), markdown(guard["message"])) for guard in report["guards"]],
        loading=_loading(export.format, str(report["model"]["description"].get("model_class"))),
    )
    (folder / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def _said(guard: Mapping[str, Any]) -> str:
    return "not measured" if guard["passed"] is None else str(guard["action"])


def _loading(format_: Format, model_class: str) -> str:
    if not model_class.isidentifier() or model_class == "None":
        model_class = "AutoModelForCausalLM"
    file = f', gguf_file="{gguf.FILE}"' if format_ == "gguf" else ""
    return f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained("."{file})'
