"""``invarlock run``: quantize a model under guard."""

from __future__ import annotations

import argparse
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
from invarlock.cli.commands.config import keys_text
from invarlock.cli.options import (
    add_judging_options,
    add_stream_option,
    check_streamed,
    judge_together,
    path_argument,
    reference_of,
)

if TYPE_CHECKING:
    from invarlock.config.schema import RunConfig
    from invarlock.pipeline import RunResult

DESCRIPTION = """\
Loads the model of a configuration, measures it, quantizes it by round-to-nearest in memory, lets the guards judge, and
prints the verdict. The input checkpoint is never touched; report.json and report.html go to
the output folder."""

EXAMPLES = """\
examples:
  invarlock run --demo
  invarlock run --demo --set edit.plan.bitwidth=2
  invarlock run -c config.yaml --out runs/int8 --strict"""


def epilog() -> str:
    return f"{EXAMPLES}\n\nconfiguration keys (nested in the file, dotted with --set):\n{keys_text()}"


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "run", help="quantize a model under guard and print the verdict", description=DESCRIPTION, epilog=epilog
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-c", "--config", type=path_argument, metavar="CONFIG", help="the run's configuration, a YAML file"
    )
    source.add_argument("--demo", action="store_true", help="a small trained model that is shipped along, offline")
    add_stream_option(parser)
    add_judging_options(parser)
    parser.set_defaults(run=run, judges=True)


def run(args: argparse.Namespace) -> int:
    check_streamed(args)
    if args.demo:
        demo = demo_folder()
        return judge_together(args, "demo", str(demo / "config.yaml"), {"model.id": str(demo / "checkpoint")}, judge)
    return judge_together(args, Path(args.config).stem, args.config, {}, judge)


def judge(args: argparse.Namespace, config: RunConfig, **shared: Any) -> RunResult:
    """Run in memory, or from disk with ``--stream``; the keywords are those of both."""
    # Only here: torch is slow to import.
    from invarlock import pipeline

    if args.stream:
        return pipeline.run_streamed(config, args.manager, **shared)
    return pipeline.run(config, args.manager, reference=reference_of(args), **shared)


def demo_folder() -> Path:
    return Path(str(resources.files("invarlock") / "demo"))
