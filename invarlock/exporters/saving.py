"""Saving an accepted model: weights in a format that others load, and all that has to travel along with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from invarlock.checkpoints.soundness import INDEX, SINGLE
from invarlock.core.progress import watched
from invarlock.core.text import markdown
from invarlock.exporters.companions import copy_companions
from invarlock.exporters.exporter import Exporter, SavedModel
from invarlock.quantization.rounding import RoundedWeight
from invarlock.quantization.rules import AnyPlan
from invarlock.quantization.scheme import Plan, Scheme
from invarlock.quantization.selection import PlannedWeight


@dataclass
class Export:
    """The way in which a model is saved, if it is accepted."""

    exporter: Exporter
    plan: AnyPlan
    source: str
    """The id of the baseline."""
    schemes: dict[str, Scheme] = field(default_factory=dict)
    """Of each rounded weight, by the name of the parameter."""
    quantized: dict[str, RoundedWeight | None] = field(default_factory=dict)
    """As ``SavedModel`` has it."""

    def take(self, plan: AnyPlan, weights: Sequence[PlannedWeight]) -> None:
        """Save what this plan makes of these weights."""
        self.plan = plan
        self.schemes = {planned.target.parameter_name: planned.scheme for planned in weights}

    def write(self, folder: Path, model: Any, tokenizer: Any, report: Mapping[str, Any]) -> None:
        """Write the model, its tokenizer, its configurations and its card to an empty folder."""
        with watched(folder, self._size_of(model)):
            if self.exporter.streams:
                self._store_all(folder, model)
            self.complete(folder, model, tokenizer, report)

    def complete(self, folder: Path, model: Any, tokenizer: Any, report: Mapping[str, Any]) -> None:
        """Add to the weights, where they are stored one by one, all that belongs to them."""
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if not (folder / "config.json").exists():
            model.config.save_pretrained(folder)
            if getattr(model, "generation_config", None):
                model.generation_config.save_pretrained(folder)
        copy_companions(self.source, folder)
        _write_card(folder, self, report)
        self.exporter.finish(folder, SavedModel(model, tokenizer, self.plan, self.quantized, self.schemes))

    def _store_all(self, folder: Path, model: Any) -> None:
        stored: dict[str, Tensor] = {}
        anywhere = self.plan if isinstance(self.plan, Plan) else self.plan.schemes[0]
        for name, weight in model.state_dict().items():
            stored |= self.exporter.store(name, weight, self.schemes.get(name, anywhere), self.quantized.get(name))
        # Codes take so much less that the library's own limit does for them.
        limit = {} if self.exporter.stores_codes else {"max_shard_size": _shard_size(self.source)}
        model.save_pretrained(folder, state_dict=stored, **limit)

    def _size_of(self, model: nn.Module) -> int:
        """About how many bytes its weights will take."""
        bits = {name: self.schemes[name].bitwidth for name in self.quantized}
        return sum(
            parameter.numel() * bits.get(name, 8 * parameter.element_size()) // 8
            for name, parameter in model.named_parameters()
        )

    @property
    def described(self) -> str:
        return f"{self.plan.described}, {self.exporter.name}"


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
        library_name=export.exporter.library,
        base_model=None if Path(export.source).exists() else export.source,
        base_model_relation=None if Path(export.source).exists() else "quantized",
        tags=["quantization", "round-to-nearest", "invarlock", export.exporter.name],
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
        loading=_loading(export.exporter.loading, str(report["model"]["description"].get("model_class"))),
    )
    (folder / "README.md").write_text(f"{str(card).rstrip()}\n", encoding="utf-8")


def _said(guard: Mapping[str, Any]) -> str:
    return "not measured" if guard["passed"] is None else str(guard["action"])


def _loading(call: str, model_class: str) -> str:
    if not model_class.isidentifier() or model_class == "None":
        model_class = "AutoModelForCausalLM"
    return f"from transformers import {model_class}\n\nmodel = {model_class}.{call}"
