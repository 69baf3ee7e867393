"""Text of a stranger as it can be shown: on a terminal, in XML, in Markdown."""

from __future__ import annotations

import re

HARMFUL = (
    r"[^\t\n\x20-\x7e\xa0-\u061b\u061d-\u200d\u2010-\u2027\u202f-\u2065"
    r"\u206a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
)
"""Control characters (a terminal would obey them, XML cannot hold them), surrogates (UTF-8 has none), separators of
lines, and marks that turn the direction of all the text that follows. A pattern that is compiled at its first use."""

_MARKS = "|".join(
    (
        r"[\\`*\[\]|~$]",
        r"(?<![^\W_])_|_(?![^\W_])",  # Inside of a word it is no emphasis.
        r"<(?=[a-zA-Z/!?])|&(?=#?\w+;)|#(?=\d)",  # Of a tag, an entity, an issue.
        r"^(?:>|#(?=#{0,5}(?: |$))|[-+](?= |$)|[-=](?=[-=]*$)|\d+(?=[.)](?: |$)))",  # Of a block.
    )
)
"""Characters that Markdown reads as markup where they stand."""


def cleaned(text: str) -> str:
    """Text in which nothing steers whatever shows it."""
    return re.sub(HARMFUL, "\ufffd", text.replace("\r\n", "\n"))


def on_one_line(text: str) -> str:
    """Cleaned text without line breaks, so that none of it looks like another line of the output."""
    return " ".join(cleaned(text).split())


def markdown(value: object) -> str:
    """A value on one line that Markdown shows as it is; nobody is notified by it."""
    text = re.sub(_MARKS, _escaped, on_one_line(str(value)))
    return text.replace("@", "@<!-- -->").replace("://", ":<!-- -->//")


def markdown_code(text: str) -> str:
    """Text on one line to be copied, as a span of code; escaped where it holds what could end one, or a cell."""
    line = on_one_line(text)
    return markdown(line) if not line or re.search("[`<|@]", line) else f"`{line}`"


def _escaped(found: re.Match[str]) -> str:
    """A mark with a backslash before it; of the number of a list entry it belongs behind."""
    return f"{found[0]}\\" if found[0].isdigit() else f"\\{found[0]}"
