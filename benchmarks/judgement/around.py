"""How well the verdict tells harm from harmless around the weights: ``python benchmarks/judgement/around.py``.

Each named edit of ``invarlock.testing.checkpoint_edits`` is made to a copy of the demo model that chats, and compared
with it through the command line. A miss is a harmful edit that is accepted without a warning; a false alarm is a
harmless one with a warning or a rejection. ``--only NAME`` prints the whole report of one edit.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
from pathlib import Path

from invarlock.cli.commands.run import demo_folder
from invarlock.cli.main import main as invarlock
from invarlock.testing.checkpoint_edits import CheckpointEdit, chatting, checkpoint_edits

SIZES = ("dataset.seq_len=128", "dataset.preview_n=4", "dataset.final_n=12")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME", help="one edit, with all that is printed of it")
    args = parser.parse_args()
    text = str(demo_folder() / "text.jsonl")
    modes = {"text": ("--dataset", text), "generated": ("--generated",), "weights only": ("--weights-only",)}
    edits = [edit for edit in checkpoint_edits() if args.only in (None, edit.name)]
    with tempfile.TemporaryDirectory() as folder:
        baseline = chatting(demo_folder() / "checkpoint", Path(folder, "baseline"))
        harmless = sum(not edit.harmful for edit in edits)
        print(f"{len(edits)} edits around the weights: {harmless} harmless, {len(edits) - harmless} harmful\n")
        print("| mode | false alarms | misses |\n|---|---|---|")
        for mode, options in modes.items():
            wrong: dict[bool, list[str]] = {True: [], False: []}
            for edit in edits:
                objected, said = _judged(baseline, edit, Path(folder, "subject"), options)
                if args.only:
                    print(said)
                if objected != edit.harmful:
                    wrong[edit.harmful].append(edit.name)
            shown = (f"{len(names)}{': ' if names else ''}{', '.join(names)}" for names in (wrong[False], wrong[True]))
            print(f"| {mode} | {' | '.join(shown)} |", flush=True)


def _judged(baseline: Path, edit: CheckpointEdit, subject: Path, options: tuple[str, ...]) -> tuple[bool, str]:
    """True if the edit was not accepted without a warning, and what was printed."""
    chatting(baseline, subject)
    edit.apply(subject)
    sizes = [word for size in SIZES for word in ("--set", size)]
    arguments = ["compare", "--baseline", str(baseline), "--subject", str(subject), *options, *sizes, "--strict", "-q"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        status = invarlock(arguments)
    for path in sorted(subject.iterdir()):
        path.unlink()
    subject.rmdir()
    return status != 0, printed.getvalue()


if __name__ == "__main__":
    main()
