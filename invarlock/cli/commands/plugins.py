"""``invarlock plugins``: which plugins there are, and whether they can be used."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterable
from functools import partial
from typing import Any

from invarlock import hookimpl
from invarlock.cli import streams
from invarlock.cli.commands import new_plugin
from invarlock.core.errors import ExitCode, UsageError, unknown
from invarlock.plugins.checking import installed_version
from invarlock.plugins.manager import PluginManager
from invarlock.plugins.plugin import Kind, Plugin, Status

DESCRIPTION = """\
Lists plugins. A plugin is ready only if it imports and can be constructed."""

EPILOG = """\
examples:
  invarlock plugins
  invarlock plugins guards --verbose
  invarlock plugins adapters --explain hf_causal
  invarlock plugins list --json
  invarlock plugins new guard my_guard"""

ALL = "list"
CATEGORIES = {ALL: tuple(Kind)} | {f"{kind.replace(' ', '-').removesuffix('s')}s": (kind,) for kind in Kind}
"""Kinds of plugins by the name of the list that shows them: each kind has a list of its own, named in the plural."""
SHOWN = (
    "name", "kind", "origin", "status", "module", "entry_point", "distribution", "version", "requires", "hooks",
    "error",
)  # fmt: skip
"""Fields of a plugin in the JSON output, ``plugins-v1``."""
STATUS = {Status.READY: "✅ Ready", Status.MISSING: "⚠ Missing", Status.ERROR: "❌ Error", Status.BLOCKED: "⏸ Blocked"}
NONE = "—"


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "plugins", help="list plugins, or write the package of a new one", description=DESCRIPTION, epilog=EPILOG
    )
    _add_listing_options(parser)
    parser.set_defaults(run=run, category=ALL, json=False, verbose=False, explain=None, only=None)
    categories = parser.add_subparsers(title="commands, by default list", metavar="COMMAND")
    for category in CATEGORIES:
        about = f"list {'all plugins' if category == ALL else category.replace('-', ' ')}"
        examples = f"examples:\n  invarlock plugins {category} --only ready\n  invarlock plugins {category} --json"
        listing = categories.add_parser(category, help=about, description=DESCRIPTION, epilog=examples)
        _add_listing_options(listing)
        listing.set_defaults(category=category)
    new_plugin.add_parser(categories)


def _add_listing_options(parser: argparse.ArgumentParser) -> None:
    """They can stand before the category and after it; what is not given must not undo what was."""
    add = partial(parser.add_argument, default=argparse.SUPPRESS)
    add("--json", action="store_true", help="print one JSON object, format plugins-v1")
    add("--verbose", "-v", action="store_true", help="also module, entry point, hooks and errors")
    add("--explain", metavar="NAME", help="everything about one plugin")
    add("--only", choices=["ready", "missing", "error", "builtin", "plugin"], help="only plugins of a status or origin")


def run(args: argparse.Namespace) -> int:
    kinds = CATEGORIES[args.category]
    listed = sorted((p for p in _all(args.manager) if p.kind in kinds), key=lambda p: (p.kind, p.name))
    if args.only:
        listed = [plugin for plugin in listed if args.only in (plugin.status, plugin.origin)]
    if args.explain:
        listed = _explained(args.explain, listed)
    if args.json:
        category = "all" if args.category == ALL else args.category
        items = [{field: getattr(plugin, field) for field in SHOWN} for plugin in listed]
        whole = {"format_version": "plugins-v1", "category": category, "items": items}
        print(json.dumps(whole, indent=2), file=streams.result())
    elif args.explain:
        print("\n\n".join(_details(plugin) for plugin in listed))
    else:
        print(table([_row(plugin) for plugin in listed]))
        if args.verbose:
            print("\n" + "\n\n".join(_details(plugin) for plugin in listed))
    return ExitCode.ACCEPTED


def _all(manager: PluginManager) -> list[Plugin]:
    """Plugins, and what they bring; one that brings something of its own name is listed as that."""
    brought = manager.brought()
    same = {(plugin.name, plugin.module) for plugin in brought}
    plugins = [p for p in manager.catalog.plugins if p.kind is not Kind.HOOKS or (p.name, p.module) not in same]
    return [*plugins, *brought]


def _explained(name: str, listed: list[Plugin]) -> list[Plugin]:
    found = [plugin for plugin in listed if plugin.name == name]
    if not found:
        raise UsageError(f"--explain: {unknown('plugin', name, [plugin.name for plugin in listed])}")
    return found


def _row(plugin: Plugin) -> list[str]:
    versions = [installed_version(text) or "not installed" for text in plugin.requires]
    return [
        plugin.name,
        plugin.origin.capitalize(),
        plugin.kind.capitalize(),
        ", ".join(plugin.requires) or NONE,
        ", ".join(versions) or NONE,
        STATUS[plugin.status] + (f": {plugin.error}" if plugin.error else ""),
    ]


def table(rows: Iterable[list[str]]) -> str:
    """Rows under headings, each column as wide as its widest cell: a name is never cut, however narrow the terminal."""
    lines = [["Name", "Origin", "Kind", "Requires", "Installed", "Status"], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _details(plugin: Plugin) -> str:
    about = (inspect.getdoc(plugin.factory) or "").splitlines() if plugin.factory is not None else []
    options = _options(plugin)
    facts = {
        "about": about[0] if about else NONE,
        "status": STATUS[plugin.status],
        "error": plugin.error,
        "origin": plugin.origin,
        "distribution": f"{plugin.distribution} {plugin.version}" if plugin.distribution else NONE,
        "module": plugin.module,
        "entry point": plugin.entry_point or NONE,
        "requires": ", ".join(plugin.requires) or NONE,
        "hooks": ", ".join(plugin.hooks) or NONE,
        "options": options,
    }
    shown = [f"  {name:<13}{value}" for name, value in facts.items() if value is not None]
    return "\n".join([f"{plugin.kind} {plugin.name}", *shown])


def _options(plugin: Plugin) -> str | None:
    """Options that a guard's section in the configuration may hold."""
    if plugin.kind is not Kind.GUARD or not plugin.is_class:
        return None
    parameters = inspect.signature(plugin.factory).parameters.values()
    return ", ".join(str(parameter) for parameter in parameters) or "none"
