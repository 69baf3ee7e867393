"""One run by several processes: what they find and save is what one would."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, read_report, slow
from forked import Forked

from invarlock.checkpoints.checksums import digests
from invarlock.core.errors import UsageError
from invarlock.core.results import Action, GuardResult
from invarlock.distributed.process_group import Ranks
from invarlock.testing import architectures

Finished = tuple[int, str, str]


@pytest.fixture
def launch(forking) -> Callable[..., list[Forked]]:
    """Start so many processes of one run, as a launcher does."""

    def start(size: int, *arguments: object) -> list[Forked]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
        return [forking.start(*arguments, RANK=str(rank), **place) for rank in range(size)]

    return start


@pytest.fixture
def together(launch) -> Callable[..., list[Finished]]:
    """Run so many processes of one run to their end; the exit status and what was said, of each."""

    def run(size: int, *arguments: object) -> list[Finished]:
        processes = launch(size, *arguments)
        return [(process.wait(), *process.said()) for process in processes]

    return run


def comparable(folder: Path) -> dict[str, Any]:
    report = read_report(folder)
    for key in ("created", "timings", "command", "config_sha256", "artifacts"):
        del report[key]
    del report["config"]["output"]["dir"]
    for timed in (*report["guards"], *report["attempts"]):
        del timed["seconds"]
    return report


@pytest.mark.parametrize(
    "stream", [pytest.param((), marks=pytest.mark.slow), ("--stream",)], ids=["memory", "streamed"]
)
def test_two_processes_find_and_save_what_one_does(config, together, stream, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(DEMO / "checkpoint").save_pretrained("sharded", max_shard_size="300KB")
    AutoTokenizer.from_pretrained(DEMO / "checkpoint").save_pretrained("sharded")
    path = config(
        model={"id": str(Path("sharded").absolute()), "device": "cpu"}, guards={}, output={"save_model": True}
    )
    for size, out in ((1, "one"), (2, "two")):
        finished = together(size, "run", "-c", path, "--out", out, *stream)
        assert [code for code, _, _ in finished] == [0] * size, finished
        assert finished[0][1].startswith("ACCEPTED")
        assert all(out == "" for _, out, _ in finished[1:])
    one, two = comparable(Path("one")), comparable(Path("two"))
    assert two == one
    saved = [digests(Path(out, "model"), "model") for out in ("one", "two")]
    for files in saved:
        files.pop("model/report.json")
    assert saved[0] == saved[1]


@pytest.mark.parametrize("size", slow(2))
def test_processes_stop_at_the_same_window(config, together, size: int) -> None:
    path = config(dataset={"provider": "demo", "seq_len": 64, "preview_n": 1}, guards={})
    for count in (1, size):
        assert [code for code, _, _ in together(count, "run", "-c", path, "--out", str(count))] == [0] * count
    assert comparable(Path("1")) == comparable(Path(str(size)))


SHARING = """
import os
from invarlock import hookimpl
from invarlock.distributed.parallel_map import each

shares_work = True

def note(*words):
    print(os.environ.get("RANK"), *words, file=open("told", "a"))

def largest(weight):
    note(tuple(weight.shape), weight.nbytes)
    return weight.abs().max().item()

@hookimpl
def invarlock_validate(model, context):
    rank = os.environ.get("RANK")
    {before}
    found = each(largest, model.parameters())
    passed = "{action}" != "rollback"
    return {{"passed": passed, "action": "{action}", "message": str(sum(found)), "metrics": {{"largest": found}}}}
"""


def told() -> list[list[str]]:
    return [line.split(maxsplit=1) for line in Path("told").read_text().splitlines()]


@pytest.mark.parametrize(
    "stream", [(), pytest.param(("--stream",), marks=pytest.mark.slow)], ids=["memory", "streamed"]
)
def test_a_guard_shares_its_work_and_the_others_are_the_first_ones(config, demo, module, together, stream) -> None:
    module("sharing", SHARING.format(before="note('asked')", action="rollback"))
    module(
        "alone",
        "import os\nfrom invarlock import hookimpl\n@hookimpl\ndef invarlock_validate():\n"
        "    print(os.environ['RANK'], 'alone', file=open('told', 'a'))\n"
        "    return {'passed': True, 'action': 'continue'}\n",
    )
    path = config(guards={"order": ["alone", "sharing", "invariants"], "fail_fast": True}, plugins=["alone", "sharing"])
    together(1, "run", "-c", path, "--out", "one", "-q", *stream)
    by_one = sorted(line for _, line in told())
    Path("told").unlink()
    finished = together(3, "run", "-c", path, "--out", "three", "-q", *stream)
    assert [code for code, _, _ in finished] == [1, 1, 1], finished
    assert comparable(Path("three")) == comparable(Path("one"))
    assert [guard["message"] for guard in read_report(Path("three"))["guards"]][-1] == "not run: guards.fail_fast"
    lines = told()
    assert sorted(line for _, line in lines if line != "asked") == [line for line in by_one if line != "asked"]
    assert sorted(rank for rank, line in lines if line == "asked") == ["0", "1", "2"]
    assert [rank for rank, line in lines if line == "alone"] == ["0"]
    bytes_of = [sum(int(line.split()[-1]) for of, line in lines if of == rank and "(" in line) for rank in "012"]
    whole = sum(parameter.nbytes for parameter in demo.parameters())
    assert sum(bytes_of) == whole
    assert max(bytes_of) - min(bytes_of) < 2 * max(parameter.nbytes for parameter in demo.parameters())


def test_work_that_fails_in_one_process_fails_the_guard_in_all(config, module, together) -> None:
    source = SHARING.replace(
        "    return weight", "    if rank_of_work() == {place!r}: raise ValueError('too odd')\n    return weight"
    )
    source += "\ndef rank_of_work():\n    return os.environ.get('RANK')\n"
    for size, place in ((1, "0"), (2, "1")):
        module("sharing", source.format(before="", action="continue", place=place))
        path = config(guards={"order": ["sharing", "invariants"]}, plugins=["sharing"], output={"save_model": True})
        finished = together(size, "run", "-c", path, "--out", str(size), "-q", "--stream")
        assert [code for code, _, _ in finished] == [3] * size, finished
    one, two = (comparable(Path(out)) for out in ("1", "2"))
    assert "in largest" in two["guards"][0].pop("error")
    assert "in largest" in one["guards"][0].pop("error")
    assert two["guards"] == one["guards"]


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("if rank == '1': raise ValueError('odd one out')", "guard sharing: processes went different ways: rank 0 shared the work on 38 weights, rank 1 was done (ValueError: odd one out (sharing.py:18))"),
        *slow(
            ("if rank == '1': os.kill(os.getpid(), 9)", "another process of the run has ended"),
            ("if rank == '1': raise SystemExit('enough')", "SystemExit: enough"),
        ),
    ],
    ids=["alone", "killed", "left"],
)  # fmt: skip
def test_processes_that_go_different_ways_in_a_guard_end_the_run(config, module, together, before, said) -> None:
    module("sharing", SHARING.format(before=before, action="continue"))
    path = config(guards={"order": ["sharing"]}, plugins=["sharing"])
    started = time.monotonic()
    first, second = together(2, "run", "-c", path, "--out", "out", "--stream")
    assert time.monotonic() - started < 60
    assert first[0] == 3, first
    assert second[0] != 0
    assert said in first[2]
    assert not Path("out/report.json").exists()


def test_a_guard_that_shares_its_work_and_changes_the_model_is_named(config, module, together) -> None:
    meddle = "import torch; model.lm_head.weight = torch.nn.Parameter(torch.zeros(1024, 128))"
    module("sharing", SHARING.format(before=meddle, action="continue"))
    path = config(guards={"order": ["sharing", "invariants"]}, plugins=["sharing"])
    finished = together(2, "run", "-c", path, "--out", "out", "-q")
    assert [code for code, _, _ in finished] == [3, 3], finished
    sharing, invariants = read_report(Path("out"))["guards"]
    assert sharing["message"].startswith("the guard changed the model (lm_head.weight")
    assert invariants["action"] == "continue"


@pytest.mark.slow
def test_three_processes_reject_and_try_again_as_one_does(config, together) -> None:
    path = config(
        model={"id": str(DEMO / "checkpoint"), "device": "cpu"}, guards={},
        edit={"plan": {"bitwidth": 2, "scope": "all"}, "retry": {"max_attempts": 3}},
    )  # fmt: skip
    for size in (1, 3):
        finished = together(size, "run", "-c", path, "--out", str(size), "-q", "--stream")
        assert len({code for code, _, _ in finished}) == 1, finished
    assert len(read_report(Path("3"))["attempts"]) > 1
    assert comparable(Path("3")) == comparable(Path("1"))


def saved_bytes(out: str) -> dict[str, str]:
    return {
        name: digest for name, digest in digests(Path(out, "model"), "model").items() if name.endswith(".safetensors")
    }


@pytest.mark.parametrize(
    ("name", "parallel"),
    [
        ("llama", "tensor"),
        *slow(("mixtral", "tensor"), ("gpt2", "fully_sharded"), ("t5", "fully_sharded")),
    ],
)
def test_a_spread_model_is_judged_and_saved_as_a_whole_one_is(config, module, together, name, parallel) -> None:
    module(
        "largest",
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_validate(model, context):\n"
        "    largest = {name: parameter.abs().max().item() for name, parameter in model.named_parameters()}\n"
        "    sizes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}\n"
        "    return {'passed': True, 'action': 'warn', 'metrics': {'largest': largest, 'sizes': sizes}}\n",
    )
    getattr(architectures, name)().save_pretrained(name)
    path = config(
        model={"id": str(Path(name).absolute()), "device": "cpu"},
        dataset={"seq_len": 32, "preview_n": 3, "final_n": 5},
        guards={"order": ["invariants", "reconstruction", "spectral", "rmt", "variance", "largest"]},
        output={"save_model": True, "format": "dequantized"}, plugins=["largest"],
    )  # fmt: skip
    together(1, "run", "-c", path, "--out", "one")
    finished = together(2, "run", "-c", path, "--out", "two", "--set", f"model.parallel={parallel}")
    assert [code for code, _, _ in finished] == [0, 0], finished
    one, two = comparable(Path("one")), comparable(Path("two"))
    assert saved_bytes("two") == saved_bytes("one")
    del one["config"]["model"], two["config"]["model"]
    assert one.pop("attribution")["modules"] and two.pop("attribution")["not_predicted"]
    if parallel == "tensor" or name == "t5":
        # Sums over parts of a row are made in another order; of T5, those of the probe of its blocks.
        for report in (one, two):
            figures = report["metrics"].pop("windows"), report["metrics"].pop("predictions"), report.pop("attempts")
            report["perplexity"] = pytest.approx(report["metrics"].pop("primary")["edited"], rel=1e-6)
            assert all(figures)
            for guard in report["guards"][1:-1]:
                del guard["metrics"], guard["message"]
            for voice in report["verdict"]["findings"]:
                del voice["message"]
        assert two.pop("perplexity") == one.pop("perplexity").expected
    assert two == one


def test_a_spread_model_comes_back_after_a_rejection(config, together) -> None:
    path = config(edit={"plan": {"bitwidth": 2, "scope": "all"}, "retry": {"max_attempts": 2}})
    finished = together(2, "run", "-c", path, "--out", "out", "-q", "--set", "model.parallel=fully_sharded")
    assert [code for code, _, _ in finished] == [1, 1], finished
    report = read_report(Path("out"))
    assert [attempt["action"] for attempt in report["attempts"]] == ["rollback", "rollback"]
    assert report["model"]["restored"] is True
    assert report["model"]["fingerprint_after"] == report["model"]["fingerprint_before"]


def test_a_guard_that_changes_a_spread_model_is_named_and_changes_nothing(config, module, together) -> None:
    module(
        "meddling",
        "import torch\nfrom invarlock import hookimpl\n@hookimpl\ndef invarlock_validate(model):\n"
        "    model.lm_head.weight = torch.nn.Parameter(torch.zeros(1024, 128))\n"
        "    return {'passed': True, 'action': 'continue'}\n",
    )
    path = config(guards={"order": ["meddling"]}, plugins=["meddling"])
    finished = together(2, "run", "-c", path, "--out", "out", "-q", "--set", "model.parallel=fully_sharded")
    assert [code for code, _, _ in finished] == [3, 3], finished
    assert "lm_head.weight" in read_report(Path("out"))["guards"][0]["message"]
    assert read_report(Path("out"))["model"]["restored"] is True


def test_what_cannot_be_spread_as_it_should_is_refused(config, together) -> None:
    architectures.gpt2().save_pretrained("gpt2")
    path = config(model={"id": str(Path("gpt2").absolute()), "parallel": "tensor"}, dataset={"seq_len": 32})
    finished = together(2, "run", "-c", path, "--out", "out")
    assert [code for code, _, _ in finished] == [2, 2], finished
    assert "transformers has no plan for gpt2 models; set it to fully_sharded" in finished[0][2]


def test_what_processes_say_of_a_guard_is_merged() -> None:
    fine = GuardResult("norms", True, Action.CONTINUE, "all fine", metrics={"largest": 1.0})
    broken = GuardResult("norms", False, Action.ABORT, "too large", metrics={"largest": 9.0})
    assert GuardResult.merged([fine, fine]) == fine
    merged = GuardResult.merged([fine, broken, fine])
    assert (merged.passed, merged.action, merged.message) == (False, Action.ABORT, "rank 1: too large")
    assert merged.metrics == {
        "largest": 9.0, "rank 0": {"largest": 1.0}, "rank 1": {"largest": 9.0}, "rank 2": {"largest": 1.0},
    }  # fmt: skip


def test_all_reject_what_one_would_and_the_first_tells_plugins(config, module, together) -> None:
    module(
        "teller",
        "import os\nfrom invarlock import hookimpl\n@hookimpl\ndef invarlock_attempt_finished(attempt):\n"
        "    print(attempt, 'told by', os.environ['RANK'], file=open('told', 'a'))\n",
    )
    path = config(edit={"plan": {"bitwidth": 2, "scope": "all"}}, output={"save_model": True}, plugins=["teller"])
    finished = together(2, "run", "-c", path, "--out", "out", "-q")
    assert Path("told").read_text() == "1 told by 0\n"
    assert [code for code, _, _ in finished] == [1, 1]
    assert sorted(entry.name for entry in Path("out").iterdir()) == ["report.html", "report.json"]


@pytest.mark.parametrize(
    ("failing", "said", "adapter", "when"),
    [
        *slow(("raise UsageError('out of luck')", "rank 1: UsageError: out of luck", "auto", "before")),
        ("os.kill(os.getpid(), 9)", "has ended", "hf_causal", "after"),
    ],
)
def test_a_process_that_dies_ends_the_run_on_all_with_its_reason(
    config, module, together, failing, said, adapter, when
) -> None:
    dying = f"    if os.environ['RANK'] == '1': {failing}\n"
    module(
        "dying",
        "import os\nfrom invarlock import hookimpl\nfrom invarlock.core.errors import UsageError\n"
        "@hookimpl(wrapper=True)\ndef invarlock_load_model():\n"
        f"{dying if when == 'before' else ''}    model = yield\n{dying}    return model\n",
    )
    model = {"id": str(DEMO / "checkpoint"), "adapter": adapter, "device": "cpu"}
    path = config(model=model, output={"save_model": True}, plugins=["dying"])
    started = time.monotonic()
    first, second = together(2, "run", "-c", path, "--out", "out")
    assert time.monotonic() - started < 60
    assert first[0] == 3, first
    assert second[0] != 0
    assert said in first[2]
    assert not Path("out/model").exists()
    assert not Path("out/report.json").exists()


def test_a_mistake_is_said_by_all_and_none_waits(together, config) -> None:
    path = config(dataset={"provider": "demo", "preview_n": 2, "final_n": 2, "seq_len": 64})
    finished = together(3, "run", "-c", path, "--out", "out")
    assert [code for code, _, _ in finished] == [2, 2, 2]
    assert all("2 windows cannot be shared by 3 processes" in err for _, _, err in finished), finished


@pytest.mark.parametrize(("count", "size", "ahead"), [(24, 2, 4), (24, 3, 8), (5, 4, 8), (4, 4, 0), (100, 7, 3), (6, 1, 2)])  # fmt: skip
def test_shares_are_all_there_is_and_even(count: int, size: int, ahead: int) -> None:
    shares = [Ranks(rank, size).share(count, ahead=ahead) for rank in range(size)]
    assert [place for share in shares for place in range(count)[share]] == list(range(count))
    work = [share.stop - share.start for share in shares]
    assert min(work) >= 1
    if count > size * ahead:
        assert abs(max(work[1:], default=work[0] + ahead) - (work[0] + ahead)) <= 1
    with pytest.raises(UsageError):
        Ranks(0, count + 1).share(count)


@pytest.mark.parametrize(
    "sizes", [[], [0, 0], [5], [1] * 10, [100, 1, 1, 1, 100, 1], [0, 7, 0, 0, 9, 0], list(range(40))], ids=str
)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_parts_are_all_there_is_and_of_about_as_many_bytes(sizes: list[int], size: int) -> None:
    parts = [Ranks(rank, size).part(sizes) for rank in range(size)]
    assert [place for part in parts for place in range(len(sizes))[part]] == list(range(len(sizes)))
    assert all(abs(sum(sizes[part]) - sum(sizes) / size) <= max(sizes) for part in parts if sizes)


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "n[03-05,9],m1", "SLURM_JOB_ID": "7"}
# Open MPI starts a daemon on each machine with srun, and what it starts has the variables of both.
DAEMON = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_NODELIST": "a1,b2", "SLURM_STEP_NODELIST": "b2"}


@pytest.mark.parametrize(
    ("variables", "node"),
    [
        ({"RANK": "2", "WORLD_SIZE": "4"}, "localhost"), (OPEN_MPI, "localhost"), (OPEN_MPI | DAEMON, "a1"),
        ({"PMI_RANK": "2", "PMI_SIZE": "4"}, "localhost"), (SLURM, "n03"), (SLURM | {"SLURM_STEP_NODELIST": "m1"}, "m1"),
    ],
)  # fmt: skip
def test_launchers_are_known_by_their_environment(variables: dict[str, str], node: str, monkeypatch) -> None:
    met = []
    monkeypatch.setattr(Ranks, "_rendezvous", lambda self, address, port: met.append((self, address)))
    assert Ranks.join() == Ranks(0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert Ranks.join() == Ranks(2, 4)
    assert met == [(Ranks(2, 4), node)]


def test_runs_at_once_on_one_machine_meet_at_ports_of_their_own(monkeypatch) -> None:
    ports = []
    monkeypatch.setattr(Ranks, "_rendezvous", lambda self, address, port: ports.append(port))
    for job, step in (("7", "0"), ("7", "1"), ("8", "0")):
        for name, value in (SLURM | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}).items():
            monkeypatch.setenv(name, value)
        Ranks.join()
    assert len(set(ports)) == 3
    assert all(29500 <= port < 32768 for port in ports)


def _answers(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


@pytest.fixture(params=["mpirun", "srun"])
def launcher(request: pytest.FixtureRequest) -> list[str]:
    """The command line that starts a command twice."""
    if request.param == "mpirun":
        if "Open MPI" not in _answers("mpirun", "--version"):
            pytest.skip("Open MPI is not installed")
        return ["mpirun", "-n", "2", "--allow-run-as-root", "--oversubscribe"]
    if "idle" not in _answers("sinfo", "--noheader"):
        pytest.skip("there is no node under Slurm here")
    return ["srun", "--ntasks", "2"]


@pytest.mark.parametrize("bitwidth", [8, 2])
def test_a_launcher_starts_what_does_what_one_process_does(invarlock, config, launcher, bitwidth: int) -> None:
    path = config(edit={"plan": {"bitwidth": bitwidth, "scope": "all"}}, output={"save_model": True})
    one = invarlock("run", "-c", path, "--out", "one", "-q")
    done = subprocess.run(
        [*launcher, sys.executable, "-m", "invarlock", "run", "-c", path, "--out", "two", "-q"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (one.code, one.out.strip()), done.stderr
    if bitwidth == 8:
        assert saved_bytes("two") == saved_bytes("one")


def test_progress_of_shared_work_is_the_sum_over_all(module, together, config) -> None:
    module(
        "watching",
        "import os\nfrom contextlib import contextmanager\nfrom invarlock.cli import progress\n"
        "@contextmanager\ndef display(*, shown):\n"
        "    yield lambda *told: print(os.environ['RANK'], *told, sep=';', file=open('told', 'a'))\n"
        "progress.display = display\n"
        "from invarlock import hookimpl\n@hookimpl\ndef invarlock_run_finished(): pass\n",
    )
    path = config(plugins=["watching"], dataset={"provider": "demo", "seq_len": 64, "preview_n": 2, "final_n": 6})
    finished = together(2, "run", "-c", path, "--out", "out", "-q")
    assert [code for code, _, _ in finished] == [0, 0], finished
    told = [line.split(";") for line in Path("told").read_text().splitlines()]
    for stage in ("baseline pass", "edited pass"):
        done = [int(line[2]) for line in told if line[1] == stage]
        assert max(done) == 8, "2 + 6 windows, whichever process was the last to tell"


@pytest.mark.parametrize("whom", [(0, 1), pytest.param((1,), marks=pytest.mark.slow)], ids=["all", "one"])
def test_processes_that_are_told_to_end_do_not_wait_for_each_other(module, config, launch, whom) -> None:
    """One waits for the other, which is busy."""
    module(
        "busy",
        "import os, time\nfrom pathlib import Path\nfrom invarlock import hookimpl\n"
        "@hookimpl\ndef invarlock_attempt_finished():\n    Path('here').touch()\n    time.sleep(600)\n",
    )
    processes = launch(2, "run", "-c", config(plugins=["busy"]), "--out", "out", "-q")
    try:
        while not Path("here").exists():
            assert all(process.poll() is None for process in processes)
            time.sleep(0.05)
        for rank in whom:
            processes[rank].send(signal.SIGTERM)
        told = processes[whom[0]]
        assert told.wait(30) == 143
        assert "interrupted by SIGTERM" in told.said()[1]
        # The other one learns of it where it next waits.
        if 0 in whom:
            processes[1].wait(30)
            assert not Path("out").exists()
    finally:
        for process in processes:
            process.kill()
