"""The hooks: each is documented in full, and its example plugin runs as the page prints it."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO, Done, read_report

from invarlock import hookspecs
from invarlock.plugins.checking import HOOKS

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "hooks.md").read_text()
SECTIONS = dict(re.findall(r"^## `(\w+)\(.*?\)`\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


def example(hook: str) -> str:
    return re.search(r"```python\n(.*?)```", SECTIONS[hook], re.DOTALL)[1]


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", HOOKS)
def test_the_page_tells_everything_of_a_hook(hook: str) -> None:
    arguments = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    assert f"## `{hook}({', '.join(arguments)})`\n" in PAGE
    for argument in arguments:
        assert re.search(rf"^- `{argument}`: ", SECTIONS[hook], re.MULTILINE), f"{hook}: {argument} is not described"
    for told in ("- called: ", "- returns: ", "- raises: "):
        assert re.search(rf"^{told}", SECTIONS[hook], re.MULTILINE), f"{hook}: {told!r} is missing"
    stops = "Stops at the first non-None result" in SECTIONS[hook]
    assert stops == bool(getattr(hookspecs, hook).invarlock_spec["firstresult"])


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_of_a_hook_is_a_whole_short_plugin(hook: str) -> None:
    source = example(hook)
    assert "from invarlock import hookimpl\n" in source
    assert re.search(rf"@hookimpl(\(wrapper=True\))?\ndef {hook}\(", source)
    assert len(source.splitlines()) <= 22


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_test_named_after_it(hook: str) -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert re.search(rf"^def test_{hook}\w*\(", tests, re.MULTILINE), f"write a test_{hook}_..."


# -- the examples, as printed ------------------------------------------------------------------------------------------

SMALL = {
    "dataset.seq_len": 32, "dataset.stride": 32, "dataset.preview_n": 1, "dataset.final_n": 4,
    "guards.order": "[invariants]", "model.adapter": "auto",
}  # fmt: skip


@pytest.fixture
def small_run(invarlock: Callable[..., Done]) -> Callable[..., Done]:
    """A run of the demo over a few windows; the report goes to ``out``."""

    def call(*arguments: object, **settings: Any) -> Done:
        keys = SMALL | {key.replace("__", "."): value for key, value in settings.items()}
        options = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
        return invarlock("run", "--demo", "--out", "out", *options, *arguments)

    return call


@pytest.fixture
def printed(module: Callable[[str, str], None]) -> Callable[..., list[str]]:
    """Write hooks' examples into modules of their names; returns the options that load them."""

    def write(*hooks: str) -> list[str]:
        names = [hook.removeprefix("invarlock_") for hook in hooks]
        for name, hook in zip(names, hooks, strict=True):
            module(name, example(hook))
        return [word for name in names for word in ("-p", name)]

    return write


def test_the_guard_above_all_hooks_runs_as_printed(small_run, module) -> None:
    module("lost", re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1])
    assert small_run("-p", "lost", guards__order="[lost]").code == 0
    guard = read_report(Path("out"))["guards"][0]
    assert (guard["name"], guard["action"]) == ("lost", "warn")
    assert guard["metrics"]["zeros"] > 0


def test_invarlock_load_model_is_asked_before_built_ins(invarlock, config, printed) -> None:
    path = config(model={"id": f"folder:{DEMO / 'checkpoint'}"}, dataset={"seq_len": 32, "preview_n": 1, "final_n": 2})
    done = invarlock("run", "-c", path, "--out", "out", *printed("invarlock_load_model"))
    assert done.code == 0, done.err
    assert read_report(Path("out"))["model"]["adapter"] == "load_model"


def test_invarlock_load_tokenizer_finds_it_where_the_plugin_says(invarlock, config, printed) -> None:
    shutil.copytree(DEMO / "checkpoint", "model")
    Path("model/tokenizer").mkdir()
    for file in Path("model").glob("tokenizer*.json"):
        file.rename(Path("model/tokenizer", file.name))
    shutil.copy("model/config.json", "model/tokenizer")
    path = config(model={"id": "model", "adapter": "load_tokenizer"})
    done = invarlock("run", "-c", path, "--out", "out", *printed("invarlock_load_tokenizer"))
    assert done.code == 0, done.err


def test_invarlock_snapshot_brings_the_baseline_back(small_run, printed) -> None:
    adapter = {"model__adapter": "snapshot", "model__dtype": "auto"}
    done = small_run(*printed("invarlock_snapshot"), **adapter, edit__plan__bitwidth=2)
    assert done.code == 1, done.err
    assert read_report(Path("out"))["model"]["restored"] is True


def test_invarlock_add_commands_adds_one(invarlock, printed) -> None:
    done = invarlock(*printed("invarlock_add_commands"), "hello")
    assert (done.code, done.out) == (0, "hello\n")


def test_invarlock_documents_are_those_of_a_plugin(small_run, module) -> None:
    Path("texts").mkdir()
    shutil.copy(DEMO / "text.jsonl", "texts/a.txt")
    module("mine", example("invarlock_documents"))
    done = small_run("-p", "mine", dataset__provider="mine", dataset__path="texts")
    assert done.code == 0, done.err
    assert read_report(Path("out"))["verdict"]["rests_on"].endswith("windows of the dataset")


DOCUMENTS = "from invarlock import hookimpl\n@hookimpl\ndef invarlock_documents(dataset):\n    return {}\n"
LAZY = "class Lazy:\n    def __len__(self): return 2\n    def __getitem__(self, row): {}\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (DOCUMENTS.format("5"), "returned int, not a list of texts"),
        (DOCUMENTS.format("'a text'"), "returned str, not a list of texts"),
        (DOCUMENTS.format("{}"), "returned dict, not a list of texts"),
        (DOCUMENTS.format("iter(['a'])"), "returned list_iterator, not a list of texts"),
        (DOCUMENTS.format("[5, 5]"), "is of type int, not a text"),
        (DOCUMENTS.format("1 / 0"), "invarlock_documents: ZeroDivisionError"),
        (DOCUMENTS.format("exit(0)"), "invarlock_documents: SystemExit"),
        (LAZY.format("raise OSError('gone')") + DOCUMENTS.format("Lazy()"), "invarlock_documents: OSError: gone"),
        (LAZY.format("exit(0)") + DOCUMENTS.format("Lazy()"), "invarlock_documents: SystemExit"),
    ],
)
def test_documents_that_are_none_are_the_providers_failure(small_run, module, source: str, said: str) -> None:
    module("odd", source)
    done = small_run("-p", "odd", dataset__provider="odd")
    assert done.code == 3
    assert "hooks odd: " in done.err and said in done.err
    assert not Path("out/report.json").exists()


def test_a_provider_speaks_to_the_user_by_a_usage_error(small_run, module) -> None:
    source = (
        "def refuse():\n    from invarlock.core.errors import UsageError\n    raise UsageError('dataset.path: no')\n"
    )
    module("odd", source + DOCUMENTS.format("refuse()"))
    done = small_run("-p", "odd", dataset__provider="odd")
    assert (done.code, done.err) == (2, "invarlock: error: dataset.path: no\n")


@pytest.mark.parametrize("streaming", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_an_unknown_provider_is_found_before_a_model_is_loaded(invarlock, config, small_run, module, streaming) -> None:
    module("mine", example("invarlock_documents"))
    path = config(model={"id": "./gone"}, dataset={"provider": "minne"})
    done = invarlock("run", "-c", path, "-p", "mine", *streaming, "--out", "out")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "dataset.provider: unknown provider 'minne'; did you mean 'mine'?" in done.err
    assert "known are generated, demo, hf," in small_run(dataset__provider="qqqq").err


@pytest.mark.parametrize("model", ["./gone", str(DEMO / "checkpoint")])
def test_doctor_finds_an_unknown_provider(invarlock, config, model: str) -> None:
    done = invarlock("doctor", "-c", config(model={"id": model}, dataset={"provider": "dmo"}), "--json")
    (finding,) = (each for each in json.loads(done.out)["findings"] if each["subject"] == "text")
    assert finding["status"] == "problem"
    assert "did you mean 'demo'?" in finding["what"]


def test_invarlock_exporters_are_known_by_name(invarlock, printed) -> None:
    assert "state-dict         | Local" in invarlock("plugins", "exporters", *printed("invarlock_exporters")).out


def test_invarlock_report_formats_are_known_by_name(invarlock, printed) -> None:
    assert "word     | Local" in invarlock("plugins", "report-formats", *printed("invarlock_report_formats")).out


# The others get along with each other: one run has them all.
TOGETHER = (
    "invarlock_describe",
    "invarlock_restore",
    "invarlock_observe",
    "invarlock_prepare",
    "invarlock_validate",
    "invarlock_attempt_finished",
    "invarlock_run_finished",
    "invarlock_report_sections",
)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Done, dict[str, Any], str]]:
    """A run of two bits, rejected twice, with all these plugins: what it printed, its report, and attempts.txt."""
    cache: list[tuple[Done, dict[str, Any], str]] = []

    def once(small_run: Callable[..., Done], printed: Callable[..., list[str]]) -> tuple[Done, dict[str, Any], str]:
        if not cache:
            plan = {"edit__plan__bitwidth": 2, "edit__retry__max_attempts": 2, "eval__max_pm_ratio": 1.001}
            done = small_run(*printed(*TOGETHER), **plan, guards__order="[invariants, observe, prepare]")
            cache.append((done, read_report(Path("out")), Path("attempts.txt").read_text()))
        return cache[0]

    return once


@pytest.fixture
def run_of_all(together, small_run, printed, monkeypatch: pytest.MonkeyPatch) -> tuple[Done, dict[str, Any], str]:
    monkeypatch.setenv("TICKET", "T-7")
    return together(small_run, printed)


def test_invarlock_describe_adds_to_the_description(run_of_all) -> None:
    description = run_of_all[1]["model"]["description"]
    assert description["n_layer"] == 4
    assert description["megabytes"] == pytest.approx(description["parameters"] * 4 / 1e6)


def test_invarlock_restore_is_wrapped(run_of_all) -> None:
    done, report, _ = run_of_all
    assert report["model"]["restored"] is True
    assert done.err.count("the baseline is back") == len(report["attempts"])


def test_invarlock_observe_shows_outputs_before_and_after(run_of_all) -> None:
    guard = run_of_all[1]["guards"][1]
    assert (guard["name"], guard["error"]) == ("observe", None)
    assert guard["message"].startswith("grown: [")


def test_invarlock_prepare_keeps_what_validate_compares(run_of_all) -> None:
    guard = run_of_all[1]["guards"][2]
    assert guard["prepare"]["largest"] > 0
    assert guard["action"] == "warn"
    assert "mlp" in guard["message"]


def test_invarlock_validate_is_timed_for_each_guard(run_of_all) -> None:
    assert re.findall(r"(\w+) took \d+\.\d\d s", run_of_all[0].err)[:3] == ["invariants", "observe", "prepare"]


def test_invarlock_attempt_finished_is_called_for_each_attempt(run_of_all) -> None:
    _, report, log = run_of_all
    assert len(report["attempts"]) == 2
    assert log.splitlines() == [f"{entry['attempt']} {entry['action']}" for entry in report["attempts"]]


def test_invarlock_run_finished_adds_to_the_report(run_of_all) -> None:
    assert run_of_all[1]["extra"] == {"ticket": "T-7"}


# -- attempts ----------------------------------------------------------------------------------------------------------

KEEPS = """\
import json
from invarlock import hookimpl

@hookimpl
def invarlock_attempt_finished(attempt, report):
    with open(f"{attempt}.json", "w") as file:
        json.dump(report, file)
    report.clear()
"""


def compared(invarlock: Callable[..., Done], *options: str) -> Done:
    checkpoint = DEMO / "checkpoint"
    return invarlock(
        "compare", "--baseline", checkpoint, "--subject", checkpoint, "--weights-only", "--out", "out", *options
    )


@pytest.mark.parametrize("command", ["run", "streamed run", "comparison"])
def test_an_attempt_is_told_as_the_report_has_it(small_run, invarlock, module, command: str) -> None:
    module("keeps", KEEPS)
    calls = {
        "run": partial(small_run, "-p", "keeps"),
        "streamed run": partial(small_run, "--stream", "-p", "keeps"),
        "comparison": partial(compared, invarlock, "-p", "keeps"),
    }
    done = calls[command]()
    assert done.code == 0, done.err
    told, report = json.loads(Path("1.json").read_text()), read_report(Path("out"))
    assert told["modules"] == report["edit"]["modules"] != []
    assert told["bitwidth"] == report["attempts"][0]["bitwidth"]
    for section in ("guards", "metrics", "verdict"):
        assert told[section] == report[section]


def test_an_abort_before_the_edit_is_an_attempt(small_run, module) -> None:
    module("keeps", KEEPS)
    module("unready", "from invarlock import hookimpl\n@hookimpl\ndef invarlock_prepare(): return {'ready': False}\n")
    assert small_run("-p", "keeps", "-p", "unready", guards__order="[unready]").code == 1
    told = json.loads(Path("1.json").read_text())
    assert (told["modules"], told["verdict"]["action"]) == ([], "abort")


@pytest.mark.parametrize("streaming", [[], ["--stream"]], ids=["in memory", "streamed"])
def test_a_plugin_that_fails_at_an_attempt_is_named_and_nothing_is_saved(small_run, module, streaming) -> None:
    module("raiser", "from invarlock import hookimpl\n@hookimpl\ndef invarlock_attempt_finished(attempt): 1 / 0\n")
    module("wrap", example("invarlock_restore"))
    done = small_run("-p", "raiser", "-p", "wrap", *streaming, output__save_model="true")
    assert done.code == 3
    assert "hooks raiser: invarlock_attempt_finished: ZeroDivisionError: division by zero" in done.err
    assert not Path("out/report.json").exists() and not Path("out/model").exists()
    if not streaming:
        assert "the baseline is back" in done.err


def test_invarlock_report_sections_adds_a_table(run_of_all) -> None:
    (section,) = run_of_all[1]["sections"]
    assert (section["title"], section["columns"]) == ("Time per guard", ["guard", "seconds"])
    assert [row[0] for row in section["rows"]] == ["invariants", "observe", "prepare"]
