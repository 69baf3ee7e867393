"""``invarlock config``: what keys a configuration has."""

from __future__ import annotations

import argparse
import json
from typing import Any

from invarlock import hookimpl
from invarlock.core.errors import ExitCode

DESCRIPTION = """\
Lists every key of a run's configuration with its type, its default and a sentence; or prints the JSON Schema, for
editors that complete and check YAML."""


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "config", help="list the configuration's keys, or print its JSON Schema", description=DESCRIPTION,
        epilog="examples:\n  invarlock config\n  invarlock config --schema > invarlock.schema.json",
    )  # fmt: skip
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema of the configuration file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.schema:
        # Only here: pydantic is slow to import.
        from invarlock.config.loading import json_schema

        print(json.dumps(json_schema(), indent=2))
    else:
        print(keys_text())
    return ExitCode.ACCEPTED


def keys_text() -> str:
    """Every key as help shows it: the key with its type and default, its sentence below."""
    # Only here: not every command has use for thirty-eight keys, and start-up counts milliseconds.
    from invarlock.config.schema import keys

    return "\n".join(f"  {key.path} ({key.type}; default {key.default})\n      {key.sentence}" for key in keys())
