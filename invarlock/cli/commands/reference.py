"""``invarlock reference``: measure a baseline once, for many edits of it."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from invarlock import hookimpl
from invarlock.cli import streams
from invarlock.cli.options import (
    add_measuring_options,
    add_text_options,
    checkpoint_and_text,
    configured,
    path_argument,
    quieten_libraries,
    set_environment,
)
from invarlock.core.errors import ExitCode

DESCRIPTION = """\
Measures a baseline once and keeps what a verdict needs of it: the windows, the losses, the likeliest predictions, and
what the guards observe. run and compare with --reference take that in place of the baseline's pass, and refuse it where
anything that it rests on differs: weights, tokenizer, windows, data type, device, versions."""

EPILOG = """\
examples:
  invarlock reference CHECKPOINT -c config.yaml --out references/original
  invarlock reference CHECKPOINT --dataset held-out.jsonl --noise --out references/held-out"""


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "reference", help="measure a baseline once, for many edits of it", description=DESCRIPTION, epilog=EPILOG
    )
    add_path = partial(parser.add_argument, type=path_argument)
    add_path("checkpoint", metavar="CHECKPOINT", help="the baseline: a folder, a file, or an id on a hub")
    add_text_options(parser)
    add_path("-c", "--config", metavar="CONFIG", help="a configuration; its model.id is CHECKPOINT")
    add_path("--out", required=True, metavar="REF", help="the folder to write, which must not be there")
    parser.add_argument(
        "--noise", action="store_true",
        help="measure it in another batch size and in bfloat16, too: the difference that the machine itself makes",
    )  # fmt: skip
    add_measuring_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    set_environment(args)
    config = configured(args, args.config, checkpoint_and_text(args.checkpoint, args))

    # Only now: a mistake in the configuration is reported without waiting for torch.
    from invarlock.cli import progress
    from invarlock.pipeline import make_reference

    quieten_libraries(verbose=False)
    with args.manager.threads.watched(), progress.display(shown=not args.quiet) as on_progress:
        made = make_reference(config, args.manager, Path(args.out), noise=args.noise, on_progress=on_progress)
    preview, final = made.windows
    size = sum(path.stat().st_size for path in Path(args.out).iterdir()) / 1e6
    streams.result().write(
        f"{args.out}: {preview} + {final} windows, {made.tokens:,} scored, {size:.1f} MB, SHA-256 {made.digest}\n"
    )
    return ExitCode.ACCEPTED
