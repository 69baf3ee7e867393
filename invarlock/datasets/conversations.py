"""Text in turns, rendered by a chat template: conversations hold the special tokens that chat models are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from invarlock.core.errors import one_line
from invarlock.datasets.layout import encode, surrounding

FORMS = (
    ("system", "user", "assistant", "user", "assistant"),
    ("user", "assistant", "user", "assistant"),
    ("user",),
)
"""Roles of the turns of a conversation, simpler and simpler: some templates know no system, some no second turn."""
TURN = 400
"""Characters of a turn, about: a hundred tokens, a short answer. Longer turns would leave few special tokens to see."""
NO_TEXT = "..."
"""In place of a turn without text, which many templates refuse."""
FIXED_DATE = "{% macro strftime_now(format) %}2024-07-26{% endmacro +%}"
"""Goes before a template: some render the day, and windows have to be the same tomorrow."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a tokenizer, and the form of conversation that it renders."""

    tokenizer: Any
    roles: tuple[str, ...] = ()
    """Of the turns; none where the template renders no conversation."""
    sample: str = ""
    """A short conversation, rendered."""
    refusal: str = ""
    """The reason that the template renders none."""

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTemplate | None:
        """The template of a tokenizer, with the first form that it renders whole; None where there is no template."""
        if not getattr(tokenizer, "chat_template", None):
            return None
        refusal = ""
        for roles in FORMS:
            turns = [f"turn {number}" for number in range(len(roles))]
            try:
                sample = _render(tokenizer, roles, turns)
            except Exception as error:
                # Templates raise whatever their authors want them to.
                refusal = one_line(error)
                continue
            if all(turn in sample for turn in turns):
                return cls(tokenizer, roles, sample)
            refusal = "it leaves turns out"
        return cls(tokenizer, refusal=refusal)

    def conversation(self, tokens: Sequence[int], length: int) -> str:
        """Tokens of text as conversation of at least ``length`` tokens, without the special ones around a window."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # Half a character at either end is decoded to a replacement character.
        rendered = "".join(self._rendered(text.strip("\N{REPLACEMENT CHARACTER}"))).removeprefix(self._prefix)
        whole = rendered
        while len(encode(self.tokenizer, whole)) < length:
            whole += rendered
        return whole

    def _rendered(self, text: str) -> Iterator[str]:
        """As many conversations as the text is long enough for, one after the other."""
        width = len(self.roles)
        turns = _cut(text, width * max(1, round(len(text) / (width * TURN))))
        for first in range(0, len(turns), width):
            yield _render(self.tokenizer, self.roles, turns[first : first + width])

    @property
    def _prefix(self) -> str:
        """The special tokens that the tokenizer itself puts before a text: templates often render them, too."""
        return "".join(self.tokenizer.convert_ids_to_tokens(list(surrounding(self.tokenizer)[0])))


def _render(tokenizer: Any, roles: Sequence[str], turns: Sequence[str]) -> str:
    messages = [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=True)]
    template = FIXED_DATE + tokenizer.get_chat_template()
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))


def _cut(text: str, count: int) -> list[str]:
    """Parts of equal length."""
    size = max(1, -(-len(text) // count))
    return [text[start : start + size].strip() or NO_TEXT for start in range(0, count * size, size)]
