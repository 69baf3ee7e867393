"""``invarlock compare``: judge an edit that somebody else made."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
from invarlock.cli.options import (
    add_judging_options,
    add_text_options,
    checkpoint_and_text,
    judge_together,
    path_argument,
    reference_of,
)
from invarlock.core.errors import UsageError

if TYPE_CHECKING:
    from invarlock.config.schema import RunConfig
    from invarlock.pipeline import RunResult

DESCRIPTION = """\
Judges an edit that somebody else made: the same guards, metric, verdict and report as a run, with a second checkpoint
in place of round-to-nearest. Tells what was changed, too. Both checkpoints are only read. Without text the baseline
writes its own windows."""

EPILOG = """\
examples:
  invarlock compare --baseline original --subject quantized
  invarlock compare --baseline original --subject quantized --dataset held-out.jsonl
  invarlock compare --baseline original --subject quantized --weights-only --json"""


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compare", help="judge an edited checkpoint against its baseline", description=DESCRIPTION, epilog=EPILOG
    )
    add_path = partial(parser.add_argument, type=path_argument)
    add_path("--baseline", required=True, metavar="DIR", help="the checkpoint before the edit")
    add_path("--subject", required=True, metavar="DIR", help="the checkpoint after the edit")
    source = add_text_options(parser)
    source.add_argument(
        "--weights-only", action="store_true", help="measure no outputs: weights and single blocks alone"
    )
    parser.add_argument(
        "--tokenizer", choices=("own", "baseline"), default="own",
        help="whose encodes the text for the subject (default: own); where ids differ, losses are compared per byte",
    )  # fmt: skip
    add_path("-c", "--config", metavar="CONFIG", help="a configuration; its model.id is the baseline's")
    add_judging_options(parser)
    parser.set_defaults(run=run, judges=True)


def run(args: argparse.Namespace) -> int:
    if args.weights_only and args.reference:
        raise UsageError(
            "--reference: it holds the baseline's outputs, and --weights-only measures none; leave one out"
        )
    return judge_together(
        args, f"compare-{Path(args.subject).name}", args.config, checkpoint_and_text(args.baseline, args), _judge
    )


def _judge(args: argparse.Namespace, config: RunConfig, **shared: Any) -> RunResult:
    # Only here: torch is slow to import.
    from invarlock.pipeline import compare

    options = {"weights_only": args.weights_only, "tokenizer": args.tokenizer, "reference": reference_of(args)}
    return compare(config, args.subject, args.manager, **options, **shared)
