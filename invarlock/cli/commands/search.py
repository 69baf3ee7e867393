"""``invarlock search``: measure plans of all sizes, and keep the smallest one that passes."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from invarlock import hookimpl
from invarlock.cli.commands.run import judge
from invarlock.cli.options import add_judging_options, add_stream_option, check_streamed, judge_together, path_argument

DESCRIPTION = """\
Finds the bits and the groups of each weight that lose least for their size, judges some of these plans as a run does,
from small to large ones, and keeps the smallest that is accepted. The report has a table and a plot of all of them,
and each as edit.plan takes it. An interrupted search goes on with the same command, if it has an output folder.
run does the same for one target: edit.plan.bitwidth auto and edit.target."""

EPILOG = """\
examples:
  invarlock search -c config.yaml --out runs/search
  invarlock search -c config.yaml --out runs/finer --set edit.search.max_attempts=8"""


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "search",
        help="measure plans of all sizes, keep the smallest that passes",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "-c", "--config", type=path_argument, metavar="CONFIG", required=True, help="as of a run, a YAML file"
    )
    add_stream_option(parser)
    add_judging_options(parser)
    parser.set_defaults(run=run, judges=True)


def run(args: argparse.Namespace) -> int:
    check_streamed(args)
    name, bits = f"search-{Path(args.config).stem}", {"edit.plan.bitwidth": "auto"}
    return judge_together(args, name, args.config, bits, partial(judge, frontier=True))
