"""``invarlock compare``: judge an edit that somebody else made."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
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
    parser.add_argument(
        "--baseline", type=path_argument, required=True, metavar="DIR", help="the checkpoint before the edit"
    )
    parser.add_argument(
        "--subject", type=path_argument, required=True, metavar="DIR", help="the checkpoint after the edit"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset", type=path_argument, metavar="FILE.jsonl", help="text to measure on, one JSON object a line"
    )
    source.add_argument("--generated", action="store_true", help="measure on windows that the baseline writes")
    source.add_argument(
        "--weights-only", action="store_true", help="measure no outputs: weights and single blocks alone"
    )
    parser.add_argument(
        "-c", "--config", type=path_argument, metavar="CONFIG", help="a configuration; its model.id is the baseline's"
    )
    add_judging_options(parser)
    parser.set_defaults(run=run, judges=True)


def run(args: argparse.Namespace) -> int:
    return judge_together(args, _judge)


def _judge(args: argparse.Namespace, ranks: Ranks) -> tuple[RunResult, Path]:
    from invarlock.config.loading import load

    config = load(args.config, args.settings, overrides(args) | _checkpoint_and_text(args))
    args.manager.add(config.plugins, args.selection.blocked)

    # Only now: a mistake in the configuration is said without waiting for torch.
    from invarlock.cli import progress
    from invarlock.pipeline import compare

    quieten_libraries(verbose=args.verbose)
    name = f"compare-{Path(args.subject).name}"
    folder = output_of(args, config.output.dir, name, ranks)
    with progress.bars(shown=ranks.is_first and not args.quiet) as on_progress:
        result = compare(
            config, args.subject, args.manager, weights_only=args.weights_only, output=folder, strict=args.strict,
            ranks=ranks, on_progress=on_progress,
        )  # fmt: skip
    return result, folder.path


def _checkpoint_and_text(args: argparse.Namespace) -> dict[str, str | None]:
    given: dict[str, str | None] = {"model.id": args.baseline}
    if args.dataset:
        given |= {"dataset.provider": "local_jsonl", "dataset.path": args.dataset}
    if args.generated:
        given |= {"dataset.provider": "generated", "dataset.path": None}
    return given
