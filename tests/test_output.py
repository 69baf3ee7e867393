"""The output folder: one run at a time, whole or not at all, and nothing of somebody else's is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import DEMO, read_report
from forked import Forked

from invarlock.checkpoints import swapping
from invarlock.checkpoints.checksums import digests
from invarlock.checkpoints.claiming import LOCK
from invarlock.checkpoints.output_folder import OURS, OutputFolder
from invarlock.core.errors import UsageError

WHOLE = ["model", "report.html", "report.json"]
FEW = {"dataset": {"provider": "demo", "seq_len": 16, "preview_n": 1, "final_n": 2}}

WAITING = """
import time
from pathlib import Path
from invarlock import hookimpl

@hookimpl
def invarlock_run_finished(report):
    Path("here").touch()
    while not Path("go").exists():
        time.sleep(0.01)
"""
"""Waits with all done but the writing."""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


@pytest.fixture
def paused(forking, module, config) -> Iterator[Callable[..., Forked]]:
    """Start a run that has everything but its output, and waits for the file ``go``."""
    module("waiting", WAITING)
    processes = []

    def start(*arguments: object, program: str = "") -> Forked:
        path = config(output={"save_model": True}, plugins=["waiting"], **FEW)
        processes.append(forking.start("run", "-c", path, "--out", "out", "-q", *arguments, program=program))
        wait_for(Path("here"))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


# -- one run at a time -------------------------------------------------------------------------------------------------


def test_a_second_run_into_a_folder_is_refused_with_whose_it_is(invarlock, config, paused) -> None:
    first = paused()
    path = config(output={"save_model": True}, **FEW)
    compared = ("compare", "--baseline", DEMO / "checkpoint", "--subject", DEMO / "checkpoint")
    for arguments in (("run", "-c", path), ("run", "-c", path, "--stream", "--force"), compared):
        done = invarlock(*arguments, "--out", "out")
        assert done.code == 2
        assert f"another run (pid {first.pid} on " in done.err
        assert done.err.count("\n") == 1
    Path("go").touch()
    assert first.wait(60) == 0
    assert names(Path("out")) == WHOLE
    assert invarlock("verify", "out").code == 0


def test_the_claim_of_a_process_that_was_killed_means_nothing(invarlock, config, paused) -> None:
    first = paused()
    first.kill()
    assert names(Path("out")) == [LOCK]
    done = invarlock("run", "-c", config(output={"save_model": True}, **FEW), "--out", "out")
    assert done.code == 0, done.err
    assert names(Path("out")) == WHOLE


def test_a_child_that_outlives_its_process_does_not_hold_the_folder(tmp_path) -> None:
    program = (
        "import os, time\nfrom pathlib import Path\nfrom invarlock.checkpoints.output_folder import OutputFolder\n"
        "with OutputFolder(Path('out')).claimed():\n"
        "    if os.fork() == 0:\n        Path('here').touch()\n        time.sleep(60)\n"
        "    print(os.getpid(), flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, process_group=0) as process:
        wait_for(Path("here"))
        process.kill()
        process.wait()
        try:
            with OutputFolder(Path("out")).claimed():
                pass
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_new_folders_of_runs_that_start_in_the_same_second_differ(tmp_path) -> None:
    from invarlock.cli.options import new_folder

    folders = [new_folder("config")[0] for _ in range(5)]
    assert len(set(folders)) == 5
    assert sorted(Path("runs").iterdir()) == sorted(folders)


def test_a_mistake_leaves_no_folder(invarlock, config) -> None:
    assert invarlock("run", "-c", config(model={"id": "nowhere"})).code == 2
    assert not Path("runs").exists()
    Path("mine").mkdir()
    assert invarlock("run", "-c", config(model={"id": "nowhere"}), "--out", "mine").code == 2
    assert names(Path("mine")) == []


# -- whole or not at all -----------------------------------------------------------------------------------------------

KILL = "lambda *given, **options: os.kill(os.getpid(), 9)"
MOMENTS = {
    "claimed": f"from invarlock.checkpoints import output_folder\noutput_folder.OutputFolder._sweep = {KILL}",
    "fingerprinted": f"from invarlock.pipeline import keeping\nkeeping.fingerprint_of = {KILL}",
    "saved": f"from invarlock.pipeline import writing\nwriting.digests = {KILL}",
    "drawn": f"from invarlock.pipeline import writing\nwriting._write_page = {KILL}",
    "half aside": (
        "from invarlock.checkpoints import swapping\nmove = swapping._move\n"
        "def half(source, target, names):\n    move(source, target, names[:2])\n    os.kill(os.getpid(), 9)\n"
        "swapping._move = half"
    ),
    "half out": (
        "from invarlock.checkpoints import swapping\nmove = swapping._move\n"
        "def half(source, target, names):\n    out = target.name == 'out'\n    move(source, target, names[:3] if out else names)\n"
        "    if out: os.kill(os.getpid(), 9)\nswapping._move = half"
    ),
}
"""When to kill: something is replaced by what kills."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_was_killed_can_be_started_again(invarlock, config, forking, moment: str) -> None:
    """Without ``--force``, and over an earlier run's output with it."""
    arguments = ("run", "-c", config(output={"save_model": True}, **FEW), "--out", "out", "-q")
    program = f"import os\n{MOMENTS[moment]}"
    for force in ((), ("--force",)):
        before = digests(Path("out"), "") if force else {}
        killed = forking.start(*arguments, *force, program=program)
        assert killed.wait() == -signal.SIGKILL, killed.said()
        # A claim brings back what a swap had half moved.
        assert invarlock("run", *arguments[1:3], "--out", "out", "--set", "model.id=nowhere").code == 2
        assert digests(Path("out"), "") == before if before else names(Path("out")) == []
        done = invarlock(*arguments, *force)
        assert done.code == 0, done.err
        assert names(Path("out")) == WHOLE
        assert invarlock("verify", "out").code == 0


def test_the_old_output_stays_until_the_new_one_is_whole(invarlock, config, paused) -> None:
    old = config(**FEW)
    assert invarlock("run", "-c", old, "--out", "out").code == 0
    before = read_report(Path("out"))
    paused("--force").send(signal.SIGTERM)
    assert_ends(Path("out"), before)


def assert_ends(folder: Path, before: dict[str, object]) -> None:
    deadline = time.monotonic() + 60
    while (folder / LOCK).exists() and time.monotonic() < deadline:
        assert read_report(folder) == before
        time.sleep(0.01)
    assert names(folder) == ["report.html", "report.json"]
    assert read_report(folder) == before


@pytest.mark.parametrize("failing", ["_move", "is_folder"])
def test_a_swap_that_fails_leaves_everything_where_it_was(tmp_path, monkeypatch, failing: str) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "report.json").write_text("old")
    output = OutputFolder(tmp_path / "out", force=True)
    rename, moves = Path.rename, []

    def fail_once(path: Path, target: Path) -> Path:
        moves.append(path)
        if len(moves) == 4:
            raise OSError("worn out")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with output.claimed(), pytest.raises(OSError, match="worn out"), output.replaced() as new:
        (new / "report.json").write_text("new")
    assert names(tmp_path / "out") == ["model", "report.json"]
    assert (tmp_path / "out" / "report.json").read_text() == "old"
    assert not output.saved


# -- somebody else's ---------------------------------------------------------------------------------------------------


def test_a_model_that_was_copied_with_its_report_is_no_litter(invarlock, config) -> None:
    shutil.copytree(DEMO / "checkpoint", "out/model")
    Path("out/model/report.json").write_text("{}")
    before = digests(Path("out"), "")
    for stream in ((), ("--stream",)):
        done = invarlock("run", "-c", config(output={"save_model": True}, **FEW), "--out", "out", *stream)
        assert done.code == 2
        assert "holds another run's model" in done.err
        assert digests(Path("out"), "") == before


@pytest.mark.parametrize("stream", [(), ("--stream",)], ids=["memory", "streamed"])
@pytest.mark.parametrize("link", ["model", "report.json", ".model.partial", ".model.journals", ".invarlock-1.partial"])
def test_what_a_link_leads_to_stays(invarlock, config, link: str, stream: tuple[str, ...]) -> None:
    shutil.copytree(DEMO / "checkpoint", "theirs")
    shutil.copytree("theirs", "theirs/old")
    before = digests(Path("theirs"), "")
    Path("out").mkdir()
    Path("out", link).symlink_to(Path("theirs/config.json" if link == "report.json" else "theirs").absolute())
    path = config(output={"save_model": True}, **FEW)
    done = invarlock("run", "-c", path, "--out", "out", "--force", *stream)
    assert done.code == 0, done.err
    assert digests(Path("theirs"), "") == before
    assert names(Path("out")) == WHOLE
    assert not any(path.is_symlink() for path in Path("out").iterdir())


def test_a_link_in_place_of_the_lock_is_refused(invarlock, config) -> None:
    Path("theirs").write_text("precious")
    Path("out").mkdir()
    Path("out", LOCK).symlink_to(Path("theirs").absolute())
    done = invarlock("run", "-c", config(**FEW), "--out", "out")
    assert done.code == 2
    assert "output.dir: out could not be written" in done.err
    assert Path("theirs").read_text() == "precious"


def test_a_report_that_leads_nowhere_is_somebody_elses(tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").symlink_to("nowhere")
    with pytest.raises(UsageError, match="holds another run's report"), OutputFolder(tmp_path / "out").claimed():
        pass


def test_files_beside_the_output_are_none_of_its_business(invarlock, config) -> None:
    Path("out/.invarlock").mkdir(parents=True)
    Path("out/notes.txt").write_text("mine")
    for force in ((), ("--force",)):
        assert invarlock("run", "-c", config(**FEW), "--out", "out", *force).code == 0
    assert names(Path("out")) == [".invarlock", "notes.txt", "report.html", "report.json"]


@pytest.mark.parametrize("odd", ["pipe", "folder", "link", "dangling"])
def test_a_report_is_written_over_nothing_but_a_file(invarlock, config, odd: str) -> None:
    assert invarlock("run", "-c", config(**FEW), "--out", "out").code == 0
    Path("theirs").write_text("precious")
    make = {
        "pipe": lambda path: os.mkfifo(path), "folder": lambda path: path.mkdir(),
        "link": lambda path: path.symlink_to("theirs"), "dangling": lambda path: path.symlink_to("nowhere"),
    }  # fmt: skip
    make[odd](Path("page.html"))
    kind = Path("page.html").lstat().st_mode
    done = invarlock("report", "out", "-o", "page.html")
    assert done.code == 2
    assert "cannot be written" in done.err or "is a named pipe" in done.err
    assert done.err.count("\n") == 1
    assert Path("page.html").lstat().st_mode == kind
    assert Path("theirs").read_text() == "precious"
    assert not Path("nowhere").exists()


# -- signals -----------------------------------------------------------------------------------------------------------

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_run_with_its_status_and_nothing_left(paused, number, monkeypatch, tmp_path) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    process = paused()
    # Impatient people send it twice.
    process.send(number)
    process.send(number)
    assert process.wait() == SIGNALS[number]
    assert process.said() == ("", f"invarlock: error: interrupted by {number.name}; nothing was saved\n")
    assert not Path("out").exists()
    assert not list((tmp_path / "tmp").glob("invarlock-*"))


def test_an_interrupt_says_what_had_been_saved(forking, config) -> None:
    program = (
        "import os\nfrom invarlock.checkpoints import swapping\nswap = swapping.swap\n"
        "def swap_and_interrupt(*given):\n    swap(*given)\n    os.kill(os.getpid(), 15)\n    os.getpid()\n"
        "swapping.swap = swap_and_interrupt"
    )
    arguments = ("run", "-c", config(output={"save_model": True}, **FEW), "--out", "out", "-q")
    process = forking.start(*arguments, program=program)
    assert process.wait() == 143
    assert (
        process.said()[1]
        == "invarlock: error: interrupted by SIGTERM; the report and the model had been saved to out\n"
    )
    assert names(Path("out")) == WHOLE


def test_an_interrupt_in_the_midst_of_a_swap_saves_nothing_and_says_so(forking, config) -> None:
    program = (
        "import os\nfrom invarlock.checkpoints import swapping\nmove = swapping._move\n"
        "def half(*given):\n    move(*given)\n    swapping._move = move\n    os.kill(os.getpid(), 2)\n    os.getpid()\n"
        "swapping._move = half"
    )
    arguments = ("run", "-c", config(output={"save_model": True}, **FEW), "--out", "out", "-q")
    process = forking.start(*arguments, program=program)
    assert process.wait() == 130
    assert process.said()[1] == "invarlock: error: interrupted by SIGINT; nothing was saved\n"
    assert not Path("out").exists()


def test_a_command_that_does_not_end_by_itself_is_ended(forking, config, module) -> None:
    """In a long call of a library no handler of Python's runs."""
    module(
        "stuck",
        "import ctypes, sys\nfrom pathlib import Path\nfrom invarlock import hookimpl\n"
        "@hookimpl\ndef invarlock_attempt_finished():\n    Path('here').touch()\n"
        "    libc = ctypes.CDLL(None)\n    [libc.usleep(900_000) for _ in iter(int, 1)]\n",
    )
    swallowing = "from invarlock.cli import signals\nsignals.GRACE = 0.2\nsignals._interrupt = lambda *given: None"
    path = config(plugins=["stuck"], **FEW)
    process = forking.start("run", "-c", path, "--out", "out", "-q", program=swallowing)
    wait_for(Path("here"))
    process.send(signal.SIGTERM)
    assert process.wait() == 143
    assert process.said()[1] == "invarlock: error: interrupted by SIGTERM; nothing was saved\n"
    assert not Path("out").exists()


def test_what_is_ignored_stays_ignored(paused) -> None:
    """As ``nohup`` has it."""
    process = paused(program="import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)")
    process.send(signal.SIGHUP)
    Path("go").touch()
    assert process.wait(60) == 0


def test_a_child_that_is_ended_ends_nobody_else(forking, config, module) -> None:
    module(
        "forking",
        "import multiprocessing, time\nfrom invarlock import hookimpl\n"
        "@hookimpl\ndef invarlock_attempt_finished():\n"
        "    child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(60,))\n"
        "    child.start()\n    child.terminate()\n    child.join()\n    time.sleep(0.5)\n"
        "    assert child.exitcode == -15, child.exitcode\n",
    )
    program = "from invarlock.cli import signals\nsignals.GRACE = 0.1"
    path = config(plugins=["forking"], **FEW)
    process = forking.start("run", "-c", path, "--out", "out", "-q", program=program)
    assert (process.wait(), process.said()[1]) == (0, "")


# -- snapshots ---------------------------------------------------------------------------------------------------------


def test_snapshots_of_dead_processes_are_swept_and_no_others(invarlock, config, paused, tmp_path, monkeypatch) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    no_memory = "from invarlock.models import snapshot\nsnapshot.free_memory = lambda: 0"
    dead = paused(program=no_memory)
    (left,) = temporary.glob("invarlock-*")
    dead.kill()
    Path("here").unlink()
    shutil.copytree(DEMO / "checkpoint", "theirs")
    (temporary / "invarlock-snapshot-1-link").symlink_to(Path("theirs").absolute())
    alive = paused(program=no_memory)
    assert not left.exists()
    (theirs,) = (path for path in temporary.glob("invarlock-*") if not path.is_symlink())
    assert invarlock("run", "-c", config(**FEW), "--out", "other").code == 0
    assert any(theirs.iterdir())
    assert any(Path("theirs").iterdir())
    Path("go").touch()
    assert alive.wait(60) == 0
    assert [path.name for path in temporary.glob("invarlock-*")] == ["invarlock-snapshot-1-link"]


def test_a_swap_is_undone_however_often(tmp_path) -> None:
    """Also where the process that undoes it is killed, too."""
    folder = tmp_path / "out"
    for stage in (swapping.ASIDE, swapping.OLD):
        folder.mkdir()
        staging = swapping.new_staging(folder)
        (staging / stage).mkdir()
        (staging / stage / "report.json").write_text("old")
        if stage == swapping.OLD:
            (folder / "report.json").write_text("new")
        for _ in range(2):
            swapping.undo(staging, folder, OURS)
            assert (folder / "report.json").read_text() == "old"
        shutil.rmtree(folder)


def test_a_journal_that_cannot_be_read_is_begun_anew(tmp_path) -> None:
    from invarlock.checkpoints.shard_writer import ShardedOutput

    for content in ("{", "[]", json.dumps({"identity": {}, "size": []})):
        ShardedOutput(tmp_path, ["one.safetensors"], {}).write("one.safetensors", {"weight": torch.ones(2)}, [])
        (entry,) = (tmp_path / ".model.journals").iterdir()
        entry.write_text(content)
        assert ShardedOutput(tmp_path, ["one.safetensors"], {}).notes("one.safetensors") is None
