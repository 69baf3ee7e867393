"""What is written about the code is true: generated pages are current, man pages are whole, guards print what they promise."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from argparse_manpage.manpage import Manpage
from conftest import DEMO, read_report

from invarlock.cli import manpages
from invarlock.config.schema import keys
from invarlock.core.api import Guard
from invarlock.core.errors import ExitCode
from invarlock.testing import run_guard, tiny_model

ROOT = Path(__file__).parent.parent


def test_generated_pages_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "write_generated.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", manpages.command_names())
def test_every_option_stands_in_the_man_page(name: str) -> None:
    page = (ROOT / "man" / f"invarlock-{name}.1").read_text().replace("\\-", "-")
    for action in getattr(manpages, f"{name}_parser")()._actions:
        for option in action.option_strings:
            assert option in page or option in ("-h", "--help"), f"{option}: tox -e man writes the page anew"
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"):
        assert re.search(rf'^\.SH "?{section}"?$', page, re.MULTILINE), section


def test_a_command_without_sections_written_by_hand_has_a_whole_page() -> None:
    assert manpages.include_of("config") is None
    page = str(Manpage(manpages.config_parser())).replace("\\-", "-")
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "EXAMPLES", "EXIT STATUS", "ENVIRONMENT", "FILES", "SEE ALSO"):
        assert re.search(rf'^\.SH "?{section}"?$', page, re.MULTILINE), section
    assert "\n  invarlock config --schema > invarlock.schema.json\n" in page


def test_every_command_stands_in_the_main_page_and_every_key_in_that_of_run() -> None:
    page = (ROOT / "man" / "invarlock.1").read_text().replace("\\-", "-")
    for name in manpages.command_names():
        assert name in page
    page = (ROOT / "man" / "invarlock-run.1").read_text().replace("\\-", "-")
    for key in keys():
        assert key.path in page


@pytest.mark.parametrize("document", ["README.md", "man/include/invarlock.man"])
def test_exit_codes_are_told_alike_everywhere(document: str) -> None:
    text = (ROOT / document).read_text()
    for code in ExitCode:
        assert re.search(rf"(\| {code.value} \||\\fB{code.value}\\fR)", text), f"{code!r} is not in {document}"


def python_blocks(document: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_guard_of_the_readme_runs_as_printed(invarlock, module) -> None:
    module("no_huge_weights", python_blocks("README.md")[0])
    order = "guards.order=[invariants, no_huge_weights]"
    done = invarlock(
        "run", "--demo", "-p", "no_huge_weights", "--set", order, "--set", "dataset.final_n=4", "--out", "out"
    )
    assert done.code == 0, done.err
    assert "largest weight" in done.out


def test_the_ten_line_guard_of_the_docs_arrives_and_runs(invarlock, module) -> None:
    module("finite", python_blocks("docs/plugins.md")[0])
    assert "finite" in invarlock("plugins", "guards", "-p", "finite").out
    done = invarlock(
        "run", "--demo", "-p", "finite", "--set", "guards.order=[finite]", "--set", "dataset.final_n=4", "--out", "o"
    )
    assert done.code == 0, done.err
    assert "all weights are finite" in done.out


def test_the_class_of_the_docs_takes_its_option(invarlock, module) -> None:
    module("finite_class", python_blocks("docs/plugins.md")[1])
    settings = ("guards.order=[finite]", "guards.finite.strict=false", "dataset.final_n=4")
    arguments = [word for setting in settings for word in ("--set", setting)]
    done = invarlock("run", "--demo", "-p", "finite_class", *arguments, "--out", "out")
    assert done.code == 0, done.err


def blocks_by_file(document: str) -> dict[str, str]:
    """Python of a page by the name of the module that it says to put it into."""
    text = (ROOT / document).read_text()
    return dict(re.findall(r"Put\s+this\s+into\s+`(\w+)\.py`[^`]*:\n\n```python\n(.*?)```", text, re.DOTALL))


SHOWN = {
    "finite": ("guard", "finite"),
    "half_models": ("adapter", "half"),
    "chapters": ("provider", "chapters"),
    "state_dicts": ("exporter", "state-dict"),
    "next_sentences": ("task", "next sentence"),
    "one_line": ("report format", "line"),
    "weigh": ("command", "weigh"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_each_kind_of_plugin_is_shown_in_one_short_file_that_brings_it(invarlock, module, name: str) -> None:
    source = blocks_by_file("docs/plugins.md")[name]
    assert len(source.splitlines()) <= 30
    module(name, source)
    items = json.loads(invarlock("plugins", "-p", name, "--json").out)["items"]
    assert SHOWN[name] in [(item["kind"], item["name"]) for item in items if item["origin"] == "local"]


def test_the_adapter_and_the_provider_of_the_docs_run(invarlock, module) -> None:
    blocks = blocks_by_file("docs/plugins.md")
    for name in ("half_models", "chapters"):
        module(name, blocks[name])
    Path("book.txt").write_text("\n\n\n".join((DEMO / "text.jsonl").read_text().splitlines()))
    values = {
        "model": {"id": f"half:{DEMO / 'checkpoint'}"},
        "dataset": {"provider": "chapters", "path": "book.txt", "seq_len": 32, "preview_n": 1, "final_n": 4},
        "guards": {"order": []},
    }
    Path("run.yaml").write_text(json.dumps(values))
    done = invarlock("run", "-c", "run.yaml", "-p", "half_models", "-p", "chapters", "--out", "out")
    assert done.code == 0, done.err
    model = read_report(Path("out"))["model"]
    assert (model["adapter"], model["description"]["dtype"]) == ("half", "bfloat16")


def guards_of(document: str) -> list[type[Guard]]:
    found = []
    for block in python_blocks(document):
        names: dict[str, Any] = {"__name__": "page"}
        exec(block, names)
        found += [value for value in names.values() if inspect.isclass(value) and Guard in value.__bases__]
    return found


@pytest.mark.parametrize("guard", guards_of("docs/plugins.md"), ids=lambda guard: guard.__name__)
def test_the_classes_of_the_docs_tell_damage(guard: type[Guard]) -> None:
    assert run_guard(guard, tiny_model()).action == "continue"
    result = run_guard(guard, tiny_model(), "with one NaN")
    assert result.error is None
    assert result.action != "continue"


def test_the_tests_of_the_docs_pass(invarlocker) -> None:
    names: dict[str, Any] = {"__name__": "page"}
    for block in python_blocks("docs/testing.md"):
        exec(block, names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 4
    for test in tests:
        test(**dict.fromkeys(inspect.signature(test).parameters, invarlocker))
