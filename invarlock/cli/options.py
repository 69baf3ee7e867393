"""Options that the commands which judge share, and what they do with them."""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock.cli import signals, streams
from invarlock.core.errors import UsageError, one_line
from invarlock.core.paths import PathError, check_working_directory, given

if TYPE_CHECKING:
    from invarlock.checkpoints.output_folder import OutputFolder
    from invarlock.config.schema import RunConfig
    from invarlock.distributed.process_group import Ranks
    from invarlock.pipeline import RunResult

log = logging.getLogger("invarlock")


def add_stream_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stream", action="store_true",
        help="leave the weights on disk and work tensor by tensor, whatever the size of the model",
    )  # fmt: skip


def add_judging_options(parser: argparse.ArgumentParser) -> None:
    """Add options that set keys, place the output, and choose how much is printed."""
    add_measuring_options(parser)
    add = parser.add_argument
    add("--out", type=path_argument, metavar="DIR", help="same as --set output.dir=DIR")
    add(
        "--reference", type=path_argument, metavar="REF",
        help="take the baseline's pass from this folder, which invarlock reference wrote",
    )  # fmt: skip
    add("--attribute", type=int, metavar="N", help="same as --set eval.attribute=N")
    add("--strict", action="store_true", help="a warning makes the exit status 1")
    add("--force", action="store_true", help="replace the output of an earlier run in the same folder")
    add("--sign", type=path_argument, metavar="KEY", help="sign the output with this private key, a PEM file")
    add("--json", action="store_true", help="print the report as JSON on stdout, whole and alone")
    add("-v", "--verbose", action="store_true", help="print a row for each weight, and libraries' warnings")


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """Add options of every command that loads models and measures them."""
    add_setting_option(parser)
    add = parser.add_argument
    add("--device", help="same as --set model.device=DEVICE")
    add("--seed", type=int, help="same as --set dataset.seed=SEED")
    add("--allow-network", action="store_true", help="let hub clients fetch models and data")
    add("-q", "--quiet", action="store_true", help="print nothing but errors and the result's line")


def add_text_options(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Add options that choose the text; returns their group, of which one can be given."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--dataset", type=path_argument, metavar="FILE.jsonl", help="text to measure on, one JSON object per line"
    )
    source.add_argument("--generated", action="store_true", help="measure on windows that the baseline writes")
    return source


def checkpoint_and_text(baseline: str, args: argparse.Namespace) -> dict[str, Any]:
    """The configuration keys that a checkpoint given by itself and the options of the text set."""
    given: dict[str, Any] = {"model.id": baseline}
    if args.dataset:
        given |= {"dataset.provider": "local_jsonl", "dataset.path": args.dataset}
    if args.generated:
        given |= {"dataset.provider": "generated", "dataset.path": None}
    return given


def check_streamed(args: argparse.Namespace) -> None:
    """:raises UsageError: an option does not go with ``--stream``."""
    if args.stream and args.reference:
        raise UsageError("--reference: weights that stay on disk have no digest to compare; run without --stream")


def reference_of(args: argparse.Namespace) -> Path | None:
    return None if args.reference is None else Path(args.reference)


def path_argument(text: str) -> str:
    """The type of an option that takes a path: see ``invarlock.core.paths``."""
    try:
        return given(text)
    except PathError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_setting_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="set a configuration key, for example edit.plan.bitwidth=4; goes before the file",
    )  # fmt: skip


def set_environment(args: argparse.Namespace) -> None:
    """Set what libraries read when they are imported: no network unless allowed, no bars but on a terminal.

    :raises UsageError: there is no working directory, without which they cannot be imported.
    """
    check_working_directory()
    if not args.allow_network:
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if args.quiet or not sys.stderr.isatty():
        os.environ |= {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def quieten_libraries(*, verbose: bool) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not verbose:
        transformers.utils.logging.set_verbosity_error()
        return
    logger = logging.getLogger("invarlock")
    logger.setLevel(min(logging.INFO, logger.level))


def new_folder(name: str) -> tuple[Path, list[Path]]:
    """A folder below ``runs`` that no other run has, named after the run and the time, and all that were made for it.

    :raises UsageError: it cannot be made.
    """
    from invarlock.checkpoints.claiming import make_folder
    from invarlock.checkpoints.output_folder import unwritable_said

    runs, stem = Path("runs"), f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    numbered = (runs / f"{stem}-{number}" for number in itertools.count(2))
    with unwritable_said(runs):
        made = make_folder(runs)
        for path in itertools.chain([runs / stem], numbered):
            with suppress(FileExistsError):
                path.mkdir()
                break
    return path, [path, *made]


def output_of(args: argparse.Namespace, configured: str | None, name: str, ranks: Ranks) -> OutputFolder:
    """The folder that was asked for, or a new one; signed by the first process, if there is a key.

    :raises UsageError: the key cannot be read.
    """
    from invarlock.checkpoints.output_folder import OutputFolder

    sign = None
    if args.sign and ranks.is_first:
        from invarlock.evidence.signing import Signer

        sign = Signer.of(args.sign).sign
    path, made = (Path(configured), []) if configured is not None else ranks.from_first(lambda: new_folder(name))
    output = OutputFolder(path, args.force, sign, made)
    if ranks.is_first:
        signals.watch(output)
    return output


def judge_together(
    args: argparse.Namespace, name: str, config: str | None, own: dict[str, Any], judge: Callable[..., RunResult]
) -> int:
    """Judge with the other processes of the run, if there are any; the first one prints.

    :param name: of the run, and of its folder unless one is configured.
    :param config: the path of the configuration; None for an empty one.
    :param own: the configuration keys that options of this command alone set.
    :param judge: called with ``args`` and the configuration, and by name with what each pipeline takes.
    :returns: the exit code of the verdict.
    """
    set_environment(args)
    from invarlock.core import temporary
    from invarlock.distributed.process_group import joined_ranks

    temporary.sweep()
    with joined_ranks() as ranks, args.manager.threads.watched():
        with stdout_for_json_alone(args):
            result, folder = _judged(args, name, config, own, judge, ranks)
        if ranks.is_first:
            _show_surely(result.report, folder, args)
        # Launchers end all when one has ended with another status than 0, as after a rejection.
        ranks.gather(None)
    return result.verdict.exit_code


def _judged(
    args: argparse.Namespace,
    name: str,
    path: str | None,
    own: dict[str, Any],
    judge: Callable[..., RunResult],
    ranks: Ranks,
) -> tuple[RunResult, Path]:
    own = {"output.dir": args.out, "eval.attribute": args.attribute} | own
    config = configured(args, path, {key: value for key, value in own.items() if value is not None})
    # Only now: a mistake in the configuration is reported without waiting for torch.
    from invarlock.cli import progress

    quieten_libraries(verbose=args.verbose)
    output = output_of(args, config.output.dir, name, ranks)
    together = {"output": output, "strict": args.strict, "ranks": ranks, "invocation": args.invocation}
    with progress.display(shown=ranks.is_first and not args.quiet) as on_progress:
        result = judge(args, config, on_progress=on_progress, **together)
    return result, output.path


def configured(args: argparse.Namespace, path: str | None, own: dict[str, Any]) -> RunConfig:
    """The configuration of a command that measures, whose plugins are loaded with it.

    :param own: keys that options of the command alone set.
    :raises UsageError: it is wrong.
    """
    from invarlock.config.loading import load

    shared = {"model.device": args.device, "dataset.seed": args.seed}
    config = load(path, args.settings, {key: value for key, value in shared.items() if value is not None} | own)
    args.manager.add(config.plugins, args.selection.blocked)
    return config


def _show_surely(report: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """Print a report that is written: if that fails, its verdict stands all the same."""
    try:
        show(report, folder, args)
    except Exception as error:
        log.warning("the report cannot be printed: %s; it is %s", one_line(error), folder / "report.json")
        log.debug("printing", exc_info=True)


def stdout_for_json_alone(args: argparse.Namespace) -> AbstractContextManager[object]:
    """Meanwhile what plugins print goes to stderr, if stdout shall hold one JSON object."""
    return redirect_stdout(sys.stderr) if args.json else nullcontext()


def show(report: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """Print a report as the options ask for it."""
    from rich.console import Console

    from invarlock.reporting.reading import SavedReport
    from invarlock.reporting.report import to_json
    from invarlock.reporting.terminal import print_report, verdict_line

    if args.json:
        streams.result().write(to_json(report))
        return
    console, cleaned = Console(file=streams.result(), soft_wrap=True), SavedReport(report).report
    if args.quiet:
        console.print(verdict_line(cleaned), highlight=False)
    else:
        print_report(cleaned, console, verbose=args.verbose)
        console.print(f"report   {folder / 'report.json'}", highlight=False, markup=False)
