"""Text as a server turns it into tokens: the vocabulary, a probe text, roles of special tokens, the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from plugins_builtin.guards.serving.findings import Findings, first_difference

PROBE = (
    "The quick brown fox, who doesn't care, jumped over 13 lazy dogs in 1985.",
    "Don't WE'LL they've I'm -- naïve café, co-operate; e.g. U.S.A. (sic)!?",
    "def f(x: int) -> dict[str, int]:\n    return {'a': x**2, \"b\": x != 0}  # done\n",
    "\tfor (int i = 0; i < n; ++i) { a[i] += 1e-3; }\n\n\n",
    "0 1 12 123 1234 12345 3.14159 -2.5e-10 1,000,000 0x1F 2024-02-29",
    "Größe, façade, Łódź, señor",
    "Съешь ещё этих мягких французских булок",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία",
    "عرف خضر بيده الحرف وكتبه",
    "דג סקרן שט בים מאוכזב",
    "ऋषियों को सताने वाले",
    "我能吞下玻璃而不伤身体。今天3月5日",
    "いろはにほへと ちりぬるを カタカナ",
    "키스의 고유조건은 입술끼리 만나야",
    "เป็นมนุษย์สุดประเสริฐ",
    "👩‍👩‍👧 🇫🇷 👍🏽 ☃ ∑∞≠ ½ ①",
    " leading,  two   three    spaces, trailing ",
    "a\r\nb\u00a0c\u200bd\u3000e\tf",
)
"""English, code, numbers, nine scripts, emoji and white space."""
NEEDED = ("get_vocab", "decode", "convert_ids_to_tokens", "all_special_tokens")
"""Methods that the tokenizer of a plugin's adapter may lack: text is read without them."""
MOST_SPECIAL = 64
"""Special tokens that are probed: those of real models, but not a thousand reserved ones."""
ROLES = ("bos_token", "unk_token", "sep_token", "cls_token", "mask_token")
"""Padding never is part of a text, and the token that ends one is among the stop tokens."""
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CONVERSATIONS: tuple[tuple[dict[str, Any], ...], ...] = (
    ({"role": "user", "content": "Hello."},),
    (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 3 + 3?"},
    ),
    (
        {"role": "user", "content": "How is the weather in Oslo?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "4 degrees"},
    ),
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]


def compare_tokens(before: Any, after: Any, found: Findings, *, converted: bool, measured: bool) -> None:
    """Add what differs between two tokenizers.

    :param measured: outputs were measured with each side's own, so that they tell what other ids do.
    :param converted: at least one of them was made from a GGUF file's metadata, by rules for splitting text that are
        transformers' own: the file may be right where these are not.
    """
    if lacking := [name for name in NEEDED for side in (before, after) if not hasattr(side, name)]:
        found.not_compared.append(f"the tokenizers: there is no {lacking[0]}")
        return
    _compare_vocabularies(before, after, found, measured)
    _compare_templates(before, after, found)
    if converted:
        found.not_compared.append("how text is split into tokens: a GGUF file's rules are not its reader's")
        return
    for role in ROLES:
        one, other = (getattr(side, role, None) for side in (before, after))
        if str(one) != str(other):
            found.warn.append(f"{role}: {_shown(one)} became {_shown(other)}")
    _compare_probe(before, after, found)


def _compare_vocabularies(before: Any, after: Any, found: Findings, measured: bool) -> None:
    from invarlock.api import ChangedVocabulary

    vocabulary = ChangedVocabulary.of(before, after)
    if vocabulary.moved:
        first, count = vocabulary.moved[0], len(vocabulary.moved)
        ids = f"{vocabulary.after[first]} in place of {vocabulary.before[first]}"
        (found.warn if measured else found.rollback).append(
            f"tokenizer: {count} tokens have another id, {first!r} {ids}: its rows have to have moved with it"
        )
    if vocabulary.lost:
        some = ", ".join(map(repr, vocabulary.lost[:3]))
        found.warn.append(f"tokenizer: {len(vocabulary.lost)} tokens are gone, {some}")


def _compare_probe(before: Any, after: Any, found: Findings) -> None:
    """Add the first part of the probe text whose ids differ, or that is decoded to other text."""
    for text in (*PROBE, *_special(before)):
        one, other = (side(text)["input_ids"] for side in (before, after))
        if difference := first_difference(one, other):
            pieces = [
                side.convert_ids_to_tokens(ids[difference.place : difference.place + 4])
                for side, ids in ((before, one), (after, other))
            ]
            found.warn.append(f"tokenizer: {text!r} is split into other tokens: {pieces[0]} became {pieces[1]}")
            return
        back = first_difference(before.decode(one), after.decode(other))
        if back:
            found.warn.append(f"tokenizer: the same ids are decoded to other text: {back}")
            return


def _special(tokenizer: Any) -> list[str]:
    """Text around each special token, so that one that is no longer special is split."""
    return [f"a{token}b" for token in tokenizer.all_special_tokens[:MOST_SPECIAL]]


def _compare_templates(before: Any, after: Any, found: Findings) -> None:
    """Add the first difference between two chat templates as they render fixed conversations."""
    for one, other in zip(_rendered(before), _rendered(after), strict=True):
        if difference := first_difference(one, other):
            what = (
                "there is no chat template any more" if not getattr(after, "chat_template", None) else "chat template"
            )
            found.warn.append(f"{what}: a conversation is rendered as {difference}")
            return


def _rendered(tokenizer: Any) -> Iterator[str]:
    """Each conversation as a server would give it to the model; of a template that refuses one, its reason."""
    for conversation in CONVERSATIONS:
        for options in ({"add_generation_prompt": True}, {"add_generation_prompt": True, "tools": TOOLS}):
            try:
                # A copy: a template may change what it is given.
                messages = json.loads(json.dumps(conversation))
                yield str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
            except Exception as error:
                # Templates raise whatever their authors want them to; both sides then have to.
                yield f"refused: {type(error).__name__}: {error}" if getattr(tokenizer, "chat_template", None) else ""


def _shown(token: Any) -> str:
    return "none" if token is None else repr(str(token))
