"""``invarlock verify``: does a report hold what it says?"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from invarlock import hookimpl
from invarlock.cli.options import path_argument, quieten_libraries, set_environment
from invarlock.core.errors import ExitCode
from invarlock.core.progress import showing

if TYPE_CHECKING:
    from invarlock.evidence.verifying import Verification

DESCRIPTION = """\
Computes again, from the windows in a report, the perplexities, the interval and the verdict, and checks the digest of
every file. With a public key it checks the signature, with checkpoints at hand it measures them again. A report is a
stranger's: no plugin that it names is imported unless -p names it too, and the network stays off."""

UNSIGNED = "UNSIGNED: consistent with itself, which a forger can be, too"

EPILOG = """\
examples:
  invarlock verify runs/int4
  invarlock verify runs/int4 --public-key key.pub
  invarlock verify runs/int4 --baseline path/to/checkpoint

exit status:
  0  all that was checked agrees
  1  something disagrees: a line says what
  2  wrong usage, or no report that can be read"""


@hookimpl
def invarlock_add_commands(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "verify", help="check a report, its files and its signature", description=DESCRIPTION, epilog=EPILOG
    )
    add_path = partial(parser.add_argument, type=path_argument)
    add_path("folder", metavar="RUN", help="the folder of a run or a comparison")
    add_path("--public-key", metavar="KEY", help="check the signature with this key, a PEM file")
    add_path("--baseline", metavar="DIR", help="measure the checkpoint before the edit again")
    remeasured = "measure the edited checkpoint again; with --baseline, by default RUN/model"
    add_path("--subject", metavar="DIR", help=remeasured)
    add_path("--dataset", metavar="PATH", help="where the data are, if not where the report says")
    parser.add_argument("--device", help="measure on this device instead of the report's")
    # The network cannot be allowed.
    parser.set_defaults(run=run, allow_network=False, quiet=False, judges=True)


def run(args: argparse.Namespace) -> int:
    set_environment(args)

    # Only now: torch is slow to import, and libraries read the environment.
    from rich.console import Console

    from invarlock.cli import progress
    from invarlock.evidence import verifying
    from invarlock.evidence.measuring import Checkpoints, measure_again

    found = verifying.Run.read(Path(args.folder))
    if args.baseline or args.subject:
        quieten_libraries(verbose=False)
    with progress.display(shown=True) as on_progress:
        with showing(partial(on_progress, "check digests")):
            verification = verifying.verify(found, args.public_key)
        checkpoints = Checkpoints(args.baseline, args.subject, args.dataset, args.device)
        measure_again(found, checkpoints, args.manager, verification, on_progress)
    console = Console(soft_wrap=True)
    for line in _lines(verification, signed=args.public_key is not None):
        console.print(line, highlight=False, markup=False)
    return ExitCode.REJECTED if verification.disagreements else ExitCode.ACCEPTED


def _lines(verification: Verification, *, signed: bool) -> Iterator[str]:
    count = len(verification.disagreements)
    yield f"DISAGREES in {count} place{'s' if count > 1 else ''}" if count else "AGREES in all that was checked"
    yield from (f"  - {disagreement}" for disagreement in verification.disagreements)
    yield from (f"checked      {what}" for what in verification.checked)
    yield from (f"not checked  {what}" for what in verification.not_checked)
    if not signed and not count:
        yield UNSIGNED
