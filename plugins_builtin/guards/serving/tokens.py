"""Text as a server turns it into tokens: the vocabulary, a probe text, roles of special tokens, the chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
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
    "Spaced out , as some corpora are : it does n't matter . Does it ? No !",
    "a\r\nb\u00a0c\u200bd\u3000e\tf",
    "cafe\u0301 \ufb01ne \uff12\uff13 \u212b",
)
"""English, code, numbers, nine scripts, emoji, white space, and characters that Unicode's normal forms compose."""
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
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "weather", "content": "4 degrees"},
    ),
    ({"role": "user", "content": [{"type": "text", "text": "Hello."}]},),
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

RENDERING: tuple[dict[str, Any], ...] = (
    {"add_generation_prompt": True},
    {"add_generation_prompt": True, "tools": TOOLS},
    {"add_generation_prompt": True, "enable_thinking": False},
    {"add_generation_prompt": False},
)
"""Arguments with which servers render a conversation: the last one is for an answer that the client has begun."""


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
    _compare_probe(before, after, around_special(before), found)


def compare_files(before: Path, after: Path, special: Iterable[str], found: Findings) -> None:
    """Add what differs between the files ``tokenizer.json`` of two folders, for servers that read no more than that.

    Some classes of transformers bring rules of their own in place of those in the file.

    :param special: text around the special tokens.
    """
    from transformers import PreTrainedTokenizerFast

    files = [folder / "tokenizer.json" for folder in (before, after)]
    if all(file.is_file() for file in files) and files[0].read_bytes() != files[1].read_bytes():
        one, other = (PreTrainedTokenizerFast(tokenizer_file=str(file)) for file in files)
        _compare_probe(one, other, special, found, "tokenizer.json")


def compare_longest(before: Any, after: Any, context: int | None, found: Findings) -> None:
    """Add a longest text of the tokenizer at which servers cut what the model could read.

    :param context: the most tokens that the edited model reads at once; None where it does not tell.
    """
    one, other = (getattr(side, "model_max_length", None) for side in (before, after))
    if isinstance(one, int) and isinstance(other, int) and other < (most := min(one, context or one)):
        found.warn.append(f"tokenizer: the longest text (model_max_length) became {other} tokens, {most} could be read")


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


def _compare_probe(before: Any, after: Any, special: Iterable[str], found: Findings, what: str = "tokenizer") -> None:
    """Add the first part of the probe text whose ids differ, or that is decoded to other text."""
    for text in (*PROBE, *special):
        one, other = (side(text)["input_ids"] for side in (before, after))
        if difference := first_difference(one, other):
            pieces = [
                side.convert_ids_to_tokens(ids[difference.place : difference.place + 4])
                for side, ids in ((before, one), (after, other))
            ]
            found.warn.append(f"{what}: {text!r} is split into other tokens: {pieces[0]} became {pieces[1]}")
            return
        back = first_difference(_decoded(before, one), _decoded(after, other))
        if back:
            found.warn.append(f"{what}: the same ids are decoded to other text: {back}")
            return


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """All of a text, and the text as it is shown to a reader, without special tokens."""
    return "".join(tokenizer.decode(ids, skip_special_tokens=skipped) for skipped in (False, True))


def around_special(tokenizer: Any) -> list[str]:
    """Each special token with text on both sides: once it is not special, it is split, or joined with the spaces."""
    # The tokenizer of an adapter's own may have no more methods than it needs.
    special = getattr(tokenizer, "all_special_tokens", [])
    return [f"a{token}b {token} c" for token in special[:MOST_SPECIAL]]


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
        for options in RENDERING:
            try:
                # A copy: a template may change what it is given.
                messages = json.loads(json.dumps(conversation))
                yield str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
            except Exception as error:
                # Templates raise whatever their authors want them to; both sides then have to.
                yield f"refused: {type(error).__name__}: {error}" if getattr(tokenizer, "chat_template", None) else ""


def _shown(token: Any) -> str:
    return "none" if token is None else repr(str(token))
