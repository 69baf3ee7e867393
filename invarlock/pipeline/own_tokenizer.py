"""The text of a comparison as the subject's own tokenizer reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from invarlock.core.errors import InputError, UsageError, one_line
from invarlock.core.results import Action, Finding
from invarlock.datasets.layout import WindowLayout, Windows
from invarlock.datasets.same_text import SameText, Side, read_same_text
from invarlock.datasets.windows import unreadable
from invarlock.models.facts import Predicted, context_of
from invarlock.models.tokens import ChangedVocabulary
from invarlock.pipeline.session import Baseline, WindowPair
from invarlock.pipeline.tasks import suited

Choice = Literal["own", "baseline"]
"""The tokenizer that encodes the text for the subject."""
PER_BYTE: Mapping[str, Predicted] = {"causal": "causal", "seq2seq": "seq2seq", "masked": "masked"}
"""Tasks that predict the tokens of a text, by name: their losses can be compared per byte of it."""
MEASURE = "--tokenizer baseline measures with the baseline's"


@dataclass(frozen=True)
class Reading:
    """The text as a subject reads it; by default it reads the baseline's windows."""

    same_text: SameText | None = None
    unreadable: str | None = None
    """The reason that the subject cannot be run over the text as its own tokenizer gives it."""
    warning: str | None = None

    @property
    def findings(self) -> list[Finding]:
        return [Finding("tokenizer", Action.WARN, self.warning)] if self.warning else []


def read_with(
    choice: Choice, baseline: Baseline, windows: WindowPair | None, model: torch.nn.Module, tokenizer: Any
) -> Reading:
    """The text of the windows as a subject reads it.

    :param windows: the baseline's; None where no outputs are measured.
    :param tokenizer: the subject's own, or None.
    """
    if baseline.tokenizer is None:
        return Reading()
    if tokenizer is None:
        return Reading(warning="the subject has none; the baseline's was used for both")
    if _encodes_alike(baseline.tokenizer, tokenizer):
        return Reading()
    taken = baseline.session.take_documents() if choice == "own" and windows is not None else None
    documents = suited(baseline.task, taken)
    if windows is None or documents is None:
        return _differing(baseline.tokenizer, tokenizer, "the baseline's was used for both")
    if _gives_same_windows(baseline, windows, model, tokenizer, documents):
        return _differing(baseline.tokenizer, tokenizer, "it gives the same ids for this text")
    return _read_itself(baseline, model, tokenizer, documents)


def _encodes_alike(one: Any, other: Any) -> bool:
    """True for tokenizers that are the same but for what does not encode; of others it takes the text to tell."""
    ours, theirs = (getattr(tokenizer, "backend_tokenizer", None) for tokenizer in (one, other))
    if ours is None or theirs is None:
        return False
    return bool(ours.to_str() == theirs.to_str() and one.special_tokens_map == other.special_tokens_map)


def _differing(one: Any, other: Any, used: str) -> Reading:
    """A warning where entries of the baseline's vocabulary are gone, or have other ids; more entries are no harm."""
    vocabulary = ChangedVocabulary.of(one, other)
    differing = len(vocabulary.moved) + len(vocabulary.lost)
    return Reading(warning=f"the subject's vocabulary differs in {differing} entries; {used}" if differing else None)


def _gives_same_windows(
    baseline: Baseline, windows: WindowPair, model: torch.nn.Module, tokenizer: Any, documents: Sequence[str]
) -> bool:
    try:
        own = baseline.windows_of(model, tokenizer, documents)
    except UsageError:
        # Too few tokens in the text, or more than the model knows.
        return False
    return all(map(Windows.equal, windows, own))


def _read_itself(baseline: Baseline, model: torch.nn.Module, tokenizer: Any, documents: Sequence[str]) -> Reading:
    dataset, context = baseline.dataset, context_of(model)
    if context is not None and context < dataset.seq_len:
        return Reading(unreadable=f"the windows are {dataset.seq_len} tokens long, and the model reads only {context}")
    different = "the subject's tokenizer gives other ids for this text"
    predicted = PER_BYTE.get(baseline.task.name)
    if predicted is None:
        return Reading(unreadable=f"{different}, and a {baseline.task.name} model has no loss per byte; {MEASURE}")

    def side(read_by: Any) -> Side:
        return Side(read_by, WindowLayout.of(model, read_by, task=predicted, length=dataset.seq_len))

    try:
        same_text = read_same_text(
            dataset, documents, side(baseline.tokenizer), side(tokenizer), most=context, chat=baseline.chat
        )
    except InputError as error:
        return Reading(unreadable=f"{different}, and {one_line(error)}; {MEASURE}")
    if reason := unreadable(same_text.windows, model):
        return Reading(unreadable=f"its own tokenizer does not fit it: {reason}")
    if not any(shared.bytes for shared in same_text.shared):
        return Reading(unreadable=f"{different}, and no token of both sides stands for the same text; {MEASURE}")
    return Reading(same_text, warning=f"{different}; the loss was compared per byte of it, and no predictions")
