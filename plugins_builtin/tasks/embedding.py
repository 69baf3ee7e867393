"""Embedding models: one vector for a text, as BERT with pooling or a folder of sentence-transformers makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from invarlock.api import FigureResult, Metric, VectorTask
from plugins_builtin.tasks.classes import is_text_backbone, transformers_class

if TYPE_CHECKING:
    from torch import Tensor

    from invarlock.api import ModelClass
    from plugins_builtin.tasks.sentence_modules import SentenceModules

MOVED = 0.02
"""Largest mean cosine distance to accept. MiniLM has 0.0005 at 8 bits per channel, 0.007 at 6, 0.023 at 5 and 0.08 at 4
on text; on random tokens 0.0006, 0.011, 0.036 and 0.11."""
ORDER = math.acos(1 - MOVED) / math.pi
"""Largest share of pairs of scores whose order may change without a warning, 6.4 %: that of two normal variables with a
correlation of 1 - MOVED (Kendall's tau is 2 asin(r) / pi)."""
REORDERED = 0.25
"""Largest share of samples whose nearest neighbour may change without a warning: MiniLM has 3 % at 8 bits, 9 % at 6 and
24 % at 4; on random tokens, which have no near neighbours, up to 4 %, 20 % and 43 %."""


class Embedding(VectorTask):
    """The vector of a text, pooled from its hidden states: BERT, MiniLM, E5."""

    name = "embedding"
    metric = Metric("cosine_distance", "mean", limit=MOVED)
    reads = frozenset({"text", "text_pair"})

    def __init__(self) -> None:
        self._baseline: SentenceModules | None = None
        self._read: dict[str, SentenceModules | None] = {}
        """By the name of the checkpoint, each read once."""
        self._pairs = False

    def owns(self, model_class: ModelClass) -> bool:
        known = transformers_class(model_class) is not None
        return known and not model_class.encoder_decoder and is_text_backbone(model_class)

    def make_windows(self, model: Any, dataset: Any, tokenizer: Any, documents: Any) -> Any:
        from invarlock.api import column, columns_of, drawn
        from plugins_builtin.tasks.sentence_modules import SentenceModules

        # The baseline's come first; those of a subject with a tokenizer of its own may follow.
        self._baseline = self._baseline or self._stated(model) or SentenceModules()
        self._pairs = "text_pair" in columns_of(documents)
        if self._pairs:
            return _both(model, dataset, tokenizer, drawn(documents, dataset))
        return super().make_windows(model, dataset, tokenizer, None if documents is None else column(documents, "text"))

    def vectors(self, model: Any, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        from plugins_builtin.tasks.sentence_modules import SentenceModules

        # An edited model that was saved without the files of sentence-transformers is served with the baseline's.
        modules = self._stated(model) or self._baseline or SentenceModules()
        return {"text": modules(model(**batch).last_hidden_state, batch["attention_mask"])}

    def figures(self, before: Any, after: Any, judging: Any) -> Sequence[FigureResult]:
        found = [neighbours("text", before, after)]
        return [*found, order("pairs", *map(_cosines, (before["text"], after["text"])))] if self._pairs else found

    def _stated(self, model: Any) -> SentenceModules | None:
        from plugins_builtin.tasks.beside import folder_beside
        from plugins_builtin.tasks.sentence_modules import SentenceModules

        name = getattr(getattr(model, "config", None), "_name_or_path", "")
        if name not in self._read:
            folder = folder_beside(model)
            self._read[name] = SentenceModules.stated(folder) if folder else None
        return self._read[name]


def neighbours(name: str, before: Any, after: Any) -> FigureResult:
    """The neighbours of vectors of one kind, against their limit."""
    from invarlock.api import changed_neighbours

    share = changed_neighbours(before[name], after[name])
    return FigureResult.held(f"nearest neighbours of {name} that changed", share, "%", REORDERED)


def order(name: str, before: Any, after: Any) -> FigureResult:
    """The order of scores, against its limit."""
    from invarlock.api import changed_order

    return FigureResult.held(f"order of {name} that changed", changed_order(before, after), "%", ORDER)


def _both(model: Any, dataset: Any, tokenizer: Any, pairs: Sequence[Any]) -> Any:
    """Windows of the first texts, then those of the second ones."""
    from invarlock.api import WindowLayout, Windows, column, encoded, padding_of

    layout = WindowLayout.of(model, tokenizer, task="causal", length=dataset.seq_len)
    parts = [encoded(column(pairs, name), tokenizer, layout, padding_of(model)) for name in ("text", "text_pair")]
    preview = dataset.preview_n
    return Windows.joined(*(part[:preview] for part in parts)), Windows.joined(*(part[preview:] for part in parts))


def _cosines(vectors: Any) -> Any:
    """The cosine of each pair, whose vectors are half of them apart."""
    from invarlock.api import unit

    first, second = unit(vectors).reshape(2, -1, vectors.shape[1])
    return (first * second).sum(axis=1, keepdims=True)
