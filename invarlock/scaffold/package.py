"""Write the package of a new plugin: names checked, files to the side, then renamed into place."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from invarlock import __version__
from invarlock.checkpoints.output_folder import staged_folder
from invarlock.core.errors import UsageError, one_line
from invarlock.plugins.catalog import Catalog
from invarlock.plugins.plugin import GROUPS, Kind

NAME = re.compile("[A-Za-z]([A-Za-z0-9_]*[A-Za-z0-9])?")


def write_package(kind: Kind, name: str, parent: Path, catalog: Catalog) -> Path:
    """Write a package whose tests pass and whose plugin is ready once it is installed.

    :param kind: one that has an entry point group.
    :param name: of the plugin, of its module and of the new folder below ``parent``.
    :param catalog: the plugins that there are, whose names are taken.
    :returns: the new folder.
    :raises UsageError: the name cannot be used, the folder is there already, or it cannot be written.
    """
    folder = parent / name
    _check(name, folder, catalog)
    try:
        with staged_folder(folder) as staged:
            for path, text in _files(kind, name).items():
                (staged / path).parent.mkdir(parents=True, exist_ok=True)
                (staged / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"plugins new: {folder} could not be written: {one_line(error)}") from error
    return folder


def _check(name: str, folder: Path, catalog: Catalog) -> None:
    if not NAME.fullmatch(name) or keyword.iskeyword(name):
        raise UsageError(
            f"plugins new: {name!r} cannot name a plugin: letters, digits and _, a letter first, no keyword of Python"
        )
    if os.path.lexists(folder):
        raise UsageError(f"plugins new: {folder} is there already; choose another name or --dir")
    for plugin in catalog.named(name):
        whose = plugin.distribution or plugin.module
        raise UsageError(f"plugins new: there is a plugin {name!r} already ({plugin.kind}, {whose}); choose another")
    if importlib.util.find_spec(name) is not None:
        raise UsageError(f"plugins new: there is a module {name!r} already, which would be hidden; choose another name")


def _files(kind: Kind, name: str) -> dict[str, str]:
    """The text of each file by its path in the package."""
    templates = Environment(
        loader=PackageLoader("invarlock.scaffold"), undefined=StrictUndefined, keep_trailing_newline=True,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    values = {
        "kind": kind,
        "name": name,
        "group": GROUPS[kind],
        "class_name": _class_name(name, kind.capitalize()),
        "distribution": f"invarlock-{name.replace('_', '-').lower()}",
        "version": __version__,
    }
    templates_of = {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        f"src/{name}/__init__.py": "__init__.py",
        f"src/{name}/{kind}.py": f"{kind}.py",
        f"tests/test_{name}.py": f"test_{kind}.py",
    }
    return {path: templates.get_template(f"{template}.jinja").render(values) for path, template in templates_of.items()}


def _class_name(name: str, suffix: str) -> str:
    """``my_guard`` becomes ``MyGuard``, ``finite`` becomes ``FiniteGuard``."""
    camel = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    return camel if camel.endswith(suffix) else camel + suffix
