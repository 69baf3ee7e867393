"""Rows of an embedding or an output head, by the tokens that they belong to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from invarlock.core.results import Action, Finding
from invarlock.core.text import on_one_line
from invarlock.models.structure import output_head
from invarlock.models.tokens import stop_tokens
from invarlock.pipeline.keeping import some
from invarlock.quantization.changes import lost_rows
from invarlock.quantization.grids import some_rows
from invarlock.quantization.selection import WeightTarget

EDIT = "edit"
"""Source of findings about what was changed."""
MOST_LOST = 0.5
"""Share of all rows: where more are lost the whole weight is, and tokens do not matter."""


@dataclass(frozen=True)
class TokenRows:
    """The tokens of a vocabulary that text seldom holds, and what became of their rows."""

    tokenizer: Any
    stops: frozenset[int]
    special: frozenset[int]
    """Tokens of chats, tools and padding; the stop tokens, too."""
    head: Tensor | None
    """The weight of the output head."""

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any) -> TokenRows:
        """:param tokenizer: may have no more than an adapter's has to have; None where there is none."""
        stops = stop_tokens(model, tokenizer)
        added = (*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ()))
        head = getattr(output_head(model), "weight", None)
        return cls(tokenizer, stops, stops.union(token for token in added if token is not None), head)

    def named(self, rows: Sequence[int]) -> str:
        """The tokens of rows that changed, special ones first, as the end of what is told of them."""
        if not rows or self.tokenizer is None:
            return ""
        ordered = sorted(rows, key=lambda row: (row not in self.stops, row not in self.special))
        return f", {some([*map(self._name, ordered[:4]), *map(str, ordered[4:])])}"

    def lost(self, target: WeightTarget, old: Tensor, new: Tensor) -> Iterator[Finding]:
        """Special tokens whose rows were zeroed, negated or replaced: text seldom holds them, and windows miss it.

        The row of a stop token in the output head decides by itself: without it no answer ends.

        :param old: (tokens, width), as is ``new``.
        """
        shared = min(len(old), len(new))
        rows = torch.tensor(sorted(row for row in self.special if 0 <= row < shared), dtype=torch.long)
        old, new = old[:shared], new[:shared]
        if not len(rows) or len(lost_rows(some_rows(old), some_rows(new))) > MOST_LOST * len(some_rows(new)):
            return
        rows = rows.to(new.device)
        before, after = old[rows].float(), new[rows].float()
        lost: defaultdict[tuple[Action, str], list[str]] = defaultdict(list)
        for place in lost_rows(before, after).tolist():
            row = int(rows[place])
            ends = row in self.stops and target.parameter is self.head
            how = _how(before[place], after[place])
            lost[Action.ROLLBACK if ends else Action.WARN, how].append(self._name(row))
        for (action, how), names in lost.items():
            what = "the row of {} was {}" if len(names) == 1 else "the rows of {} were {}"
            message = f"{target.name}: {what.format(some(names), how)}, and text seldom holds such tokens"
            yield Finding(EDIT, action, message)

    def _name(self, row: int) -> str:
        convert = getattr(self.tokenizer, "convert_ids_to_tokens", None)
        text = convert(row) if convert else None
        name = str(row) if text is None else f"`{on_one_line(str(text))}`"
        if row in self.stops:
            return f"the stop token {name}"
        return name if text is not None else f"token {name}"


def _how(before: Tensor, after: Tensor) -> str:
    if not after.any():
        return "zeroed"
    return "negated" if torch.equal(before, -after) else "replaced"
