"""Transcripts that a speech model writes, and the words in which two of them differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from invarlock.api import UNSCORED, FigureResult, device_of, evaluating

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from invarlock.api import Windows

TRANSCRIBED = 8
"""Sounds that are transcribed: each takes a step of the decoder for every token, and the words of eight sounds, a
hundred or more, tell 5 % of errors from 20 %."""
WORDS = 0.10
"""Largest word error rate without a warning: two people who transcribe conversations differ in 6 to 11 % of the words
(Xiong et al. 2016, "Achieving Human Parity in Conversational Speech Recognition"). It warns and does not reject: one
near tie that tips changes all that is written after it, and the loss of the same words tells what an edit costs."""


def transcribed(model: Any, windows: Windows) -> NDArray[np.int64]:
    """The likeliest tokens, one after the other, that a model writes of each sound: (sounds, tokens of the target).

    They follow what the targets begin with and no window scores: the task, the language.
    """
    import torch

    device, scored = device_of(model), (windows.labels != UNSCORED).any(dim=0)
    given = int(scored.int().argmax()) + 1
    assert windows.decoder_input_ids is not None
    rows = windows.decoder_input_ids[:, :given].to(device)
    with evaluating(model):
        encoded = model.get_encoder()(windows.media["input_features"].to(device)).last_hidden_state
        for _ in range(given, len(scored) + 1):
            likeliest = model(encoder_outputs=(encoded,), decoder_input_ids=rows).logits[:, -1:].argmax(dim=-1)
            rows = torch.cat([rows, likeliest], dim=1)
    written: NDArray[np.int64] = rows[:, given:].cpu().numpy()
    return written


def word_errors(before: NDArray[np.int64], after: NDArray[np.int64], tokenizer: Any) -> FigureResult:
    """Word error rate against the baseline's transcripts; that of tokens where there is no tokenizer."""
    # Of a pass in several steps each has transcripts of its first sounds; the first of all are those of one step, too.
    first = zip(before[:TRANSCRIBED], after[:TRANSCRIBED], strict=True)
    pairs = [(_words(one, tokenizer), _words(other, tokenizer)) for one, other in first]
    words, errors = sum(len(one) for one, _ in pairs), sum(_distance(*pair) for pair in pairs)
    name = f"{'token' if tokenizer is None else 'word'} error rate against the baseline's transcripts"
    return FigureResult.held(name, errors / words if words else None, "%", WORDS)


def _words(row: NDArray[np.int64], tokenizer: Any) -> list[Any]:
    tokens: list[int] = row.tolist()
    end = getattr(tokenizer, "eos_token_id", None)
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
    return tokens if tokenizer is None else str(tokenizer.decode(tokens, skip_special_tokens=True)).split()


def _distance(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Smallest number of words to put in, leave out or replace (Levenshtein 1966)."""
    costs = list(range(len(other) + 1))
    for place, word in enumerate(one, start=1):
        diagonal, costs[0] = costs[0], place
        for column, candidate in enumerate(other, start=1):
            replaced = diagonal + (word != candidate)
            diagonal, costs[column] = costs[column], min(replaced, costs[column] + 1, costs[column - 1] + 1)
    return costs[-1]
