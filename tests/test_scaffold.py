"""``invarlock plugins new``: packages whose tests pass and whose plugins are ready, and what is refused; the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from projects import lay_editable

from invarlock.plugins.plugin import GROUPS

EXAMPLES = Path(__file__).parent.parent / "examples" / "plugins"


@pytest.fixture
def packages(invarlocker) -> dict[str, Path]:
    """A new package of each kind, installed as ``pip install -e`` would."""
    for kind in GROUPS:
        done = invarlocker.run("plugins", "new", kind, f"my_{kind}", "--dir", "src")
        assert done.code == 0, done.err
    return {kind: lay_editable(Path("src", f"my_{kind}"), invarlocker.site) for kind in GROUPS}


def test_the_plugins_of_new_packages_are_ready(invarlocker, packages) -> None:
    items = json.loads(invarlocker.run("plugins", "--only", "ready", "--json").out)["items"]
    mine = {item["kind"]: item for item in items if item["name"].startswith("my_")}
    assert mine.keys() == GROUPS.keys()
    for kind, item in mine.items():
        assert item["entry_point"].startswith(f"{GROUPS[kind]}: my_{kind} = my_{kind}.{kind}")
        assert item["distribution"] == f"invarlock-my-{kind}"


def test_the_tests_of_new_packages_and_of_the_examples_pass(invarlocker, packages) -> None:
    examples = [lay_editable(folder, invarlocker.site) for folder in EXAMPLES.iterdir()]
    assert {folder.name for folder in examples} == {"dead_rows", "npz_folder", "output_range"}
    # In one process, because torch takes seconds to import.
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider", *packages.values(), *examples],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "37 passed" in done.stdout


@pytest.mark.parametrize("kind", GROUPS)
def test_a_new_package_is_in_good_style_and_whole(invarlocker, packages, kind: str) -> None:
    files = {path.relative_to(packages[kind]).as_posix() for path in packages[kind].rglob("*") if path.is_file()}
    name = f"my_{kind}"
    source = {f"src/{name}/__init__.py", f"src/{name}/{kind}.py", f"tests/test_{name}.py"}
    assert files == {"pyproject.toml", "README.md"} | source
    for path in packages[kind].rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert "{{" not in text and "{%" not in text
            assert text.endswith("\n") and not text.endswith("\n\n")
            assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1st", "cannot name a plugin"),
        ("my-guard", "cannot name a plugin"),
        ("../up", "cannot name a plugin"),
        ("_hidden", "cannot name a plugin"),
        ("größe", "cannot name a plugin"),
        ("class", "cannot name a plugin"),
        ("spectral", "there is a plugin 'spectral' already"),
        ("json", "there is a module 'json' already"),
    ],
)
def test_a_name_that_cannot_be_used_is_one_line(invarlocker, name: str, said: str) -> None:
    done = invarlocker.run("plugins", "new", "guard", name)
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("there", ["folder", "file", "dangling link"])
def test_what_is_there_already_is_left_alone(invarlocker, there: str) -> None:
    target = Path("mine")
    {"folder": target.mkdir, "file": target.touch, "dangling link": lambda: target.symlink_to("nowhere")}[there]()
    done = invarlocker.run("plugins", "new", "guard", "mine")
    assert done.code == 2
    assert "mine is there already" in done.err
    assert list(Path().iterdir()) == [target]


def test_a_folder_that_cannot_be_written_is_one_line(invarlocker) -> None:
    Path("file").touch()
    done = invarlocker.run("plugins", "new", "guard", "mine", "--dir", "file")
    assert done.code == 2
    assert "file/mine could not be written: NotADirectoryError" in done.err


def test_an_unknown_kind_or_category_names_the_known_ones(invarlocker) -> None:
    for arguments, known in ((("plugins", "new", "gard", "mine"), "adapter"), (("plugins", "gards"), "guards")):
        done = invarlocker.run(*arguments)
        assert done.code == 2
        assert known in done.err
