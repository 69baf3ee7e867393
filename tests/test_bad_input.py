"""Bad input is exit status 2 and one line, and the doctor finds it before a run does."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from broken_checkpoints import BROKEN, edit_json
from conftest import DEMO

SMALL = {"provider": "demo", "seq_len": 16, "preview_n": 1, "final_n": 2}


def is_one_line(done) -> bool:
    return done.err.startswith("invarlock: error: ") and done.err.count("\n") == 1


def problems(done) -> list[str]:
    return [line for line in done.out.splitlines() if line.startswith("problem")]


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_checkpoint_is_refused_and_the_doctor_finds_it(how: str, invarlock, config) -> None:
    damage, said = BROKEN[how]
    shutil.copytree(DEMO / "checkpoint", "broken")
    damage(Path("broken"))
    path = config(model={"id": "broken"}, dataset=SMALL)
    done = invarlock("run", "-c", path, "--out", "out", "--quiet")
    assert (done.code, is_one_line(done)) == (2, True), done.err
    assert said in done.err
    assert not Path("out").exists()
    found = invarlock("doctor", "-c", path)
    assert (found.code, found.err) == (1, "")
    assert problems(found)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"dataset": SMALL | {"seq_len": 4096}}, "dataset.seq_len: 4096 is more than the 256"),
        ({"dataset": {"seq_len": 4096}}, "dataset.seq_len: 4096 is more than the 256"),
        ({"dataset": SMALL | {"final_n": 90_000}}, "the text is enough for"),
        ({"dataset": {"provider": "local_text", "path": "missing.txt"}}, "missing.txt does not exist"),
        ({"dataset": {"provider": "local_jsonl", "path": "folder"}}, "folder is a folder"),
        ({"dataset": {"provider": "local_jsonl", "path": "deep.jsonl"}}, "deep.jsonl, line 1: not JSON"),
        ({"dataset": {"provider": "local_jsonl", "path": "latin.txt"}}, "latin.txt is not UTF-8"),
        ({"model": {"id": "missing/checkpoint/here"}}, "missing/checkpoint/here does not exist"),
        ({"model": {"id": "folder"}}, "folder has no config.json"),
        ({"model": {"id": "latin.txt"}}, "model.id"),
        ({"model": {"id": "some/model"}}, "some/model) nor a cached checkpoint; check the path"),
        ({"guards": {"order": ["no_such_guard"]}}, "no_such_guard"),
        ({"edit": {"plan": {"include": ["nothing.like.it"]}}}, "edit.plan"),
        ({"output": {"dir": "latin.txt"}}, "latin.txt is a file"),
        ({"output": {"dir": "used"}}, "holds another run's report.json"),
        ({"output": {"save_model": True, "format": "gguf"}}, "output.format: gguf"),
    ],
)  # fmt: skip
def test_what_a_run_refuses_is_a_problem_to_the_doctor(sections, said: str, invarlock, config) -> None:
    Path("folder").mkdir()
    Path("used").mkdir()
    Path("used/report.json").write_text("{}")
    Path("deep.jsonl").write_text("[" * 100_000)
    Path("latin.txt").write_bytes(b"caf\xe9")
    path = config(**({"dataset": SMALL} | sections))
    done = invarlock("run", "-c", path, "--quiet")
    assert (done.code, is_one_line(done)) == (2, True), done.err
    assert said in done.err
    found = invarlock("doctor", "-c", path)
    assert (found.code, found.err) == (1, "")
    assert problems(found)


# -- paths -------------------------------------------------------------------------------------------------------------

HOPELESS = {
    "": "is empty",
    "${INVARLOCK_NOWHERE}/x": "'INVARLOCK_NOWHERE' is not set",
    "${HOME": "is not closed",
    "~nobody_of_that_name/x": "there is no user nobody_of_that_name",
    "n" * 300: "File name too long",
    "file/below/it": "lies below a file",
    "loop": "Too many levels of symbolic links",
    "pipe": "is a named pipe",
    "socket": "is a socket",
    os.fsdecode(b"latin-\xe9"): "is not UTF-8",
    "a\0b": "holds a NUL",
}
KEYS = ("model.id", "dataset.path", "output.dir")
OPTIONS = {
    "-c": ["run", "-c"],
    "--out": ["run", "--demo", "--out"],
    "--sign": ["run", "--demo", "--sign"],
    "--baseline": ["compare", "--subject", "there", "--baseline"],
    "--subject": ["compare", "--baseline", "there", "--subject"],
    "--dataset": ["compare", "--baseline", "there", "--subject", "there", "--dataset"],
    "doctor -c": ["doctor", "-c"],
    "RUN": ["report"],
    "-o": ["report", "there", "-o"],
    "verify RUN": ["verify"],
    "--public-key": ["verify", "there", "--public-key"],
    "verify --dataset": ["verify", "there", "--dataset"],
    "--dir": ["plugins", "new", "guard", "some_guard", "--dir"],
}


@pytest.fixture
def oddities() -> None:
    Path("there").mkdir()
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")


@pytest.mark.parametrize("path", HOPELESS, ids=lambda path: repr(path)[:20])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_path_that_cannot_be_one_is_refused_by_every_option(option: str, path: str, oddities, invarlock) -> None:
    done = invarlock(*OPTIONS[option], path)
    assert (done.code, is_one_line(done)) == (2, True), done.err
    assert HOPELESS[path] in done.err


@pytest.mark.parametrize("path", HOPELESS, ids=lambda path: repr(path)[:20])
@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_cannot_be_one_is_refused_by_every_key(key: str, path: str, oddities, invarlock, config) -> None:
    quoted = json.dumps(path)
    provider = ("--set", "dataset.provider=local_text") if key == "dataset.path" else ()
    done = invarlock("run", "-c", config(), *provider, "--set", f"{key}={quoted}")
    assert (done.code, is_one_line(done)) == (2, True), done.err
    assert f"--set {key}=" in done.err


def test_variables_and_the_home_folder_are_expanded_everywhere(invarlock, config, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(DEMO))
    path = config(model={"id": "${WHERE}/checkpoint"}, dataset=SMALL, output={"dir": "~/run"})
    path.rename("moved.yaml")
    assert invarlock("run", "-c", "~/moved.yaml", "--quiet").code == 0
    assert invarlock("verify", "${HOME}/run").code == 0
    assert (tmp_path / "run" / "report.json").is_file()


def test_what_is_not_there_is_reported_by_its_absolute_path(invarlock, config, tmp_path: Path) -> None:
    for arguments in (
        ["run", "-c", "gone.yaml"],
        ["report", "gone"],
        ["verify", "gone"],
        ["compare", "--baseline", "./gone", "--subject", "./gone"],
        ["compare", "--baseline", DEMO / "checkpoint", "--subject", DEMO / "checkpoint", "--dataset", "gone.jsonl"],
        ["run", "-c", config(), "--set", "dataset.path=gone.txt", "--set", "dataset.provider=local_text"],
        ["run", "-c", config(), "--set", "model.id=./gone"],
        ["run", "-c", config(), "--sign", "gone.pem"],
    ):
        done = invarlock(*arguments)
        assert (done.code, is_one_line(done)) == (2, True), done.err
        assert f"{tmp_path}/gone" in done.err


def test_a_hub_id_is_none_where_a_path_is_meant(invarlock, config) -> None:
    assert "nor a cached checkpoint" in invarlock("run", "-c", config(model={"id": "owner/name"})).err
    for path in ("./owner/name", "owner/name/more", "/owner/name"):
        assert "nor a cached checkpoint" not in invarlock("run", "-c", config(model={"id": path})).err


def test_a_working_directory_that_is_gone_is_one_line() -> None:
    for arguments in ("run -c config.yaml", "run --demo", "doctor -c config.yaml", "compare --baseline a --subject b",
                      "report run", "verify run"):  # fmt: skip
        script = f"mkdir gone && cd gone && rmdir ../gone && exec {sys.executable} -m invarlock {arguments}"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 2, (arguments, done.stderr)
        assert done.stderr.count("\n") == 1
        assert "the working directory is gone" in done.stderr


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{0}  ./{1}", "{0} *{1}", "SHA256 ({1}) = {0}", "{0}  {1}", "SHA256 (./{1}) = {0}"])
def test_digests_are_matched_in_every_form(form: str, invarlock, config) -> None:
    shutil.copytree(DEMO / "checkpoint", "copy")
    digest = hashlib.sha256(Path("copy/model.safetensors").read_bytes()).hexdigest()
    path = config(model={"id": "copy"}, dataset=SMALL)
    Path("copy/SHA256SUMS").write_text(form.format(digest, "model.safetensors") + "\n")
    done = invarlock("run", "-c", path, "--quiet")
    assert (done.code, done.err) == (0, "")
    Path("copy/SHA256SUMS").write_text(form.format("0" * 64, "model.safetensors") + "\n")
    done = invarlock("run", "-c", path, "--quiet")
    assert (done.code, is_one_line(done)) == (2, True)
    assert "does not match its digest in copy/SHA256SUMS; fetch it again" in done.err


def test_digests_of_other_files_alone_are_reported(invarlock, config) -> None:
    shutil.copytree(DEMO / "checkpoint", "copy")
    Path("copy/SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n")
    done = invarlock("run", "-c", config(model={"id": "copy"}, dataset=SMALL), "--quiet")
    assert done.code == 0
    assert "lists none of the weight files beside it" in done.err


def test_a_model_in_the_cache_of_a_hub_is_found_and_streamed(tmp_path: Path, config) -> None:
    """In a process of its own: the library reads where its cache is when it is imported."""
    hub, commit = tmp_path / "hub", "0" * 40
    repository = hub / "hub" / "models--owner--name"
    shutil.copytree(DEMO / "checkpoint", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    path = config(model={"id": "owner/name"}, dataset=SMALL)
    code = "import sys; from invarlock.cli.main import main; sys.exit(any(main(line.split()) for line in sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, f"doctor -c {path}", f"run --stream --quiet -c {path}"],
        env=os.environ | {"HF_HOME": str(hub)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"in the cache, {repository}" in done.stdout
    assert "GiB of weights" in done.stdout
    assert "ACCEPTED" in done.stdout


def test_a_special_token_that_has_no_id_is_part_of_no_window(invarlock, config) -> None:
    shutil.copytree(DEMO / "checkpoint", "checkpoint")
    edit_json(Path("checkpoint/tokenizer_config.json"), eos_token="")
    path = config(model={"id": "checkpoint"}, dataset={"provider": "demo", "seq_len": 16, "preview_n": 1, "final_n": 2})
    for command in ("doctor", "run"):
        assert invarlock(command, "-c", path).code == 0
