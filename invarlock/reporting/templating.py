"""Templates of pages and of Markdown; whatever is put into them is escaped."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from invarlock.core.text import markdown, markdown_code
from invarlock.reporting import describing, facts, searches, shares

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

TEMPLATES = resources.files(__package__) / "templates"


@lru_cache(maxsize=2)
def environment(*, html: bool) -> jinja2.Environment:
    """:param html: escape for HTML, else for Markdown."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=html,
        finalize=None if html else _escaped,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    wording = {**vars(describing), **vars(facts), **vars(searches), **vars(shares)}
    made.filters |= {"breakable": breakable, "code": _code, "raw": _Raw}
    made.filters |= {name: put for name, put in wording.items() if callable(put) and name.islower()}
    return made


class _Raw(str):
    """Markdown as it is."""


def _escaped(value: object) -> str:
    return value if isinstance(value, _Raw) else markdown(value)


def _code(text: str) -> _Raw:
    return _Raw(markdown_code(text))


def breakable(text: object) -> Markup:
    """Text of a page that breaks after the dots and slashes of a name, where a line is too short for it."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(?<=[^\W\d])[./]+(?=\w)|(?<=\d)[./]+(?=[^\W\d])", r"\g<0><wbr/>", str(escape(text))))


def source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
