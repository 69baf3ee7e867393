"""Templates of pages and of Markdown; whatever is put into them is escaped."""

from __future__ import annotations

from functools import lru_cache
from importlib import resources
from typing import TYPE_CHECKING

from invarlock.core.text import markdown
from invarlock.reporting import describing

if TYPE_CHECKING:
    import jinja2

TEMPLATES = resources.files(__package__) / "templates"


@lru_cache(maxsize=2)
def environment(*, html: bool) -> jinja2.Environment:
    """:param html: escape for HTML, else for Markdown."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FunctionLoader(source),
        autoescape=html,
        finalize=None if html else markdown,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {name: put for name, put in vars(describing).items() if callable(put) and name.islower()}
    return made


def source(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
