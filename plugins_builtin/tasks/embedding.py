"""Embedding models: one vector for a text, as BERT with pooling or a folder of sentence-transformers makes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.api import FigureResult, Metric, VectorTask
from plugins_builtin.tasks.classes import is_text_backbone, transformers_class

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass
    from plugins_builtin.tasks.pooling import Pooling

MOVED = 0.02
"""Largest mean cosine distance to accept. MiniLM has 0.0005 at 8 bits per channel, 0.007 at 6, 0.023 at 5 and 0.08 at 4
on text; on random tokens 0.0006, 0.011, 0.036 and 0.11."""
REORDERED = 0.25
"""Largest share of samples whose nearest neighbour may change without a warning: MiniLM has 3 % at 8 bits, 9 % at 6 and
24 % at 4; on random tokens, which have no near neighbours, up to 4 %, 20 % and 43 %."""


class Embedding(VectorTask):
    """The vector of a text, pooled from its hidden states: BERT, MiniLM, E5."""

    name = "embedding"
    metric = Metric("cosine_distance", "mean", limit=MOVED)

    def __init__(self) -> None:
        self._baseline: Pooling | None = None

    def owns(self, model_class: ModelClass) -> bool:
        known = transformers_class(model_class) is not None
        return known and not model_class.encoder_decoder and is_text_backbone(model_class)

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Sequence[str] | None) -> Any:
        from plugins_builtin.tasks.pooling import Pooling

        # The baseline's come first; those of a subject with a tokenizer of its own may follow.
        self._baseline = self._baseline or _stated(model) or Pooling()
        return super().make_windows(model, dataset, tokenizer, documents)

    def vectors(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        from plugins_builtin.tasks.pooling import Pooling

        # An edited model that was saved without the files of sentence-transformers is served with the baseline's.
        pooling = _stated(model) or self._baseline or Pooling()
        return {"text": pooling(model(**batch).last_hidden_state, batch["attention_mask"])}

    def figures(self, before: Any, after: Any, judging: Any) -> Sequence[FigureResult]:
        return [neighbours("text", before, after)]


def neighbours(name: str, before: Any, after: Any) -> FigureResult:
    """The neighbours of vectors of one kind, against their limit."""
    from invarlock.api import changed_neighbours

    share = changed_neighbours(before[name], after[name])
    return FigureResult.held(f"nearest neighbours of {name} that changed", share, "%", REORDERED)


def _stated(model: Any) -> Pooling | None:
    from plugins_builtin.tasks.pooling import Pooling

    folder = getattr(getattr(model, "config", None), "_name_or_path", "")
    return Pooling.stated(Path(folder)) if folder else None
