"""The protocol of a format, and what it is given of an accepted model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    # A plugin derives from the protocol, and can be listed without torch.
    import torch
    from torch import Tensor

    from invarlock.quantization.rounding import RoundedWeight
    from invarlock.quantization.rules import AnyPlan
    from invarlock.quantization.scheme import Scheme
    from invarlock.quantization.selection import WeightTarget


@dataclass(frozen=True)
class SavedModel:
    """An accepted model; its tokenizer is None where the checkpoint has none."""

    model: Any
    tokenizer: Any
    plan: AnyPlan
    quantized: Mapping[str, RoundedWeight | None]
    """By the name of the parameter, where codes are stored; None of a weight that was stored on the way."""
    schemes: Mapping[str, Scheme]
    """Of each rounded weight, by the name of the parameter; the plan itself, unless it is a list of rules."""


class Exporter(Protocol):
    """A format in which an accepted model is saved. The defaults are those of a plain checkpoint."""

    name: str
    """As ``output.format`` has it."""
    streams: bool = True
    """True if ``store`` says what safetensors files hold, weight by weight; otherwise ``finish`` writes all weights."""
    stores_codes: bool = False
    """True if ``store`` and ``finish`` need the scales and zero points of quantized weights."""
    scale_dtype: torch.dtype | None = None
    """The only dtype that the format has for scales; weights are rounded with such scales. None: any.

    With a dtype, grids that are not symmetric have a minimum of that dtype and no zero point."""
    mixes: bool = False
    """True if a model can hold weights of several schemes: without it, a plan is never a list of rules."""
    shares_fused: bool = False
    """True if weights that engines fuse (q/k/v, gate/up, the experts of a layer) have to share a scheme."""
    library: str = "transformers"
    """The hub's name of the library that loads it, for the model card."""
    loading: str = 'from_pretrained(".")'
    """The call that loads it, of a model class of transformers, for the model card."""

    def refuse(self, plan: Scheme, targets: Sequence[WeightTarget], model: Any, tokenizer: Any) -> str | None:
        """The reason why the format cannot hold what a plan makes of a model, or None; its fields in backquotes.

        :param plan: the scheme of ``targets``; of a list of rules each one is asked about.
        """
        return None

    def store(self, name: str, weight: Tensor, plan: Scheme, parameters: RoundedWeight | None) -> dict[str, Tensor]:
        """Tensors that are stored of one weight, by name.

        :param plan: the scheme of the weight; of one that is not rounded, any of the plan's.
        :param parameters: of a quantized weight, if the format stores codes.
        """
        return {name: weight}

    def finish(self, folder: Path, saved: SavedModel) -> None:
        """Complete a folder that holds the weights, if they are streamed, the configurations and the tokenizer."""
        return None
