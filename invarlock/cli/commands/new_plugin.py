"""``invarlock plugins new``: write the package of a new plugin."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from invarlock.cli.options import path_argument
from invarlock.core.errors import ExitCode
from invarlock.plugins.plugin import GROUPS, Kind

DESCRIPTION = """\
Writes a complete package to a folder of the plugin's name: pyproject.toml with the entry point, source, tests that
pass, README."""

EPILOG = """\
examples:
  invarlock plugins new guard my_guard
  invarlock plugins new adapter my_format --dir ~/src
  invarlock plugins new hooks my_hooks"""


def add_parser(categories: Any) -> None:
    parser = categories.add_parser(
        "new", help="write the package of a new plugin", description=DESCRIPTION, epilog=EPILOG
    )
    parser.add_argument("kind", choices=[*map(str, GROUPS)], help="what the plugin is")
    parser.add_argument("name", metavar="NAME", help="name of the plugin, of its module and of its folder")
    parser.add_argument(
        "--dir", type=path_argument, default=".", metavar="DIR", help="where the folder goes; default the current one"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    # Only here: templates are slow to import.
    from invarlock.scaffold.package import write_package

    folder = write_package(Kind(args.kind), args.name, Path(args.dir), args.manager.catalog)
    print(f"wrote {folder}")
    print(f"next: python -m pip install -e '{folder}[test]' && python -m pytest {folder}")
    return ExitCode.ACCEPTED
