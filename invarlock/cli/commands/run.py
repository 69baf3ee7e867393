"""``invarlock run``: quantize a model under guard."""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from invarlock import hookimpl
from invarlock.cli.commands.config import keys_text
from invarlock.core.errors import ExitCode

DESCRIPTION = """\
Loads the model of a configuration, measures it, quantizes it by round-to-nearest in memory, lets the guards judge, and
prints the verdict. The input checkpoint is never touched; report.json goes to the output folder."""

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
    source.add_argument("-c", "--config", metavar="CONFIG", help="the run's configuration, a YAML file")
    source.add_argument("--demo", action="store_true", help="a small trained model that is shipped along, offline")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="set a configuration key, for example edit.plan.bitwidth=4; goes before the file",
    )  # fmt: skip
    parser.add_argument("--device", help="same as --set model.device=DEVICE")
    parser.add_argument("--out", metavar="DIR", help="same as --set output.dir=DIR")
    parser.add_argument("--seed", type=int, help="same as --set dataset.seed=SEED")
    parser.add_argument("--strict", action="store_true", help="a warning makes the exit status 1")
    parser.add_argument("--force", action="store_true", help="replace the output of an earlier run in the same folder")
    parser.add_argument("--json", action="store_true", help="print the report as JSON on stdout, whole and alone")
    parser.add_argument("--allow-network", action="store_true", help="let hub clients fetch models and data")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors and the verdict's line")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="print a row for each weight, and libraries' warnings"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _set_environment(args)
    from invarlock.config.loading import load

    config = load(_config_path(args), args.settings, _overrides(args))
    args.manager.add(config.plugins, args.selection.blocked)

    # Only now: a mistake in the configuration is said without waiting for torch.
    from invarlock.checkpoints.writing import OutputFolder
    from invarlock.cli import progress
    from invarlock.pipeline import run as run_pipeline
    from invarlock.reporting.report import to_json

    _quieten_libraries(args.verbose)
    folder = OutputFolder(_output_folder(args, config.output.dir), force=args.force)
    with progress.bars(shown=not args.quiet) as on_progress:
        result = run_pipeline(config, args.manager, output=folder, strict=args.strict, on_progress=on_progress)
    if args.json:
        sys.stdout.write(to_json(result.report))
    else:
        _print_verdict(result.report, folder.path, args)
    return ExitCode(result.report["verdict"]["exit_code"])


def _set_environment(args: argparse.Namespace) -> None:
    """What libraries read when they are imported: no network unless allowed, no bars but on a terminal."""
    if not args.allow_network:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if args.quiet or not sys.stderr.isatty():
        os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def _config_path(args: argparse.Namespace) -> str:
    return str(demo_folder() / "config.yaml") if args.demo else args.config


def demo_folder() -> Path:
    return Path(str(resources.files("invarlock") / "demo"))


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    given = {"model.device": args.device, "output.dir": args.out, "dataset.seed": args.seed}
    if args.demo:
        given["model.id"] = str(demo_folder() / "checkpoint")
    return {key: value for key, value in given.items() if value is not None}


def _output_folder(args: argparse.Namespace, configured: str | None) -> Path:
    """The folder that was asked for, or a new one named after the configuration and the time."""
    if configured is not None:
        return Path(configured)
    name = "demo" if args.demo else Path(args.config).stem
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    path, number = Path("runs", f"{name}-{stamp}"), 1
    while path.exists():
        number += 1
        path = Path("runs", f"{name}-{stamp}-{number}")
    return path


def _quieten_libraries(verbose: bool) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not verbose:
        transformers.utils.logging.set_verbosity_error()
    logging.getLogger("invarlock").setLevel(
        min(logging.INFO if verbose else logging.WARNING, logging.getLogger("invarlock").level)
    )


def _print_verdict(report: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    from rich.console import Console

    from invarlock.reporting.terminal import render, verdict_line

    console = Console(soft_wrap=True)
    if args.quiet:
        console.print(verdict_line(report), highlight=False)
    else:
        render(report, console, verbose=args.verbose)
        console.print(f"report   {folder / 'report.json'}", highlight=False, markup=False)
