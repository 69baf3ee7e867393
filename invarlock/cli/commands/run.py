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
    judge_together,
    output_of,
    overrides,
    path_argument,
    quieten_libraries,
)

if TYPE_CHECKING:
    from invarlock.distributed.process_group import Ranks
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
    parser.add_argument(
        "--stream", action="store_true",
        help="leave the weights on disk and work tensor by tensor, whatever the size of the model",
    )  # fmt: skip
    add_judging_options(parser)
    parser.set_defaults(run=run, judges=True)


def run(args: argparse.Namespace) -> int:
    return judge_together(args, _judge)


def _judge(args: argparse.Namespace, ranks: Ranks) -> tuple[RunResult, Path]:
    from invarlock.config.loading import load

    config = load(_config_path(args), args.settings, overrides(args) | _demo_model(args))
    args.manager.add(config.plugins, args.selection.blocked)

    # Only now: a mistake in the configuration is said without waiting for torch.
    from invarlock import pipeline
    from invarlock.cli import progress

    quieten_libraries(verbose=args.verbose)
    name = "demo" if args.demo else Path(args.config).stem
    run_pipeline = pipeline.run_streamed if args.stream else pipeline.run
    folder = output_of(args, config.output.dir, name, ranks)
    with progress.bars(shown=ranks.is_first and not args.quiet) as on_progress:
        result = run_pipeline(
            config, args.manager, output=folder, strict=args.strict, ranks=ranks, on_progress=on_progress
        )
    return result, folder.path


def _config_path(args: argparse.Namespace) -> str:
    return str(demo_folder() / "config.yaml") if args.demo else args.config


def _demo_model(args: argparse.Namespace) -> dict[str, str]:
    return {"model.id": str(demo_folder() / "checkpoint")} if args.demo else {}


def demo_folder() -> Path:
    return Path(str(resources.files("invarlock") / "demo"))
