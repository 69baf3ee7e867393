"""What people look at: every rendering of real and of hostile reports, and several runs side by side."""

from __future__ import annotations

import copy
import html
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import xmlschema
import yaml
from conftest import DEMO, read_report
from markdown_it import MarkdownIt

from invarlock.cli.main import main
from invarlock.core.results import EditedWeight
from invarlock.core.text import markdown
from invarlock.reporting import describing
from invarlock.reporting.formats import FORMATS
from invarlock.reporting.page import render_html
from invarlock.reporting.plots import drawing
from invarlock.reporting.plots.data import SpectrumChange, points
from invarlock.reporting.plots.plot import plots_of
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import json_schema

FORMAT_NAMES = [each.name for each in FORMATS]
SCHEMAS = Path(__file__).parent / "schemas"
JUNIT = xmlschema.XMLSchema(SCHEMAS / "junit-jenkins.xsd")
SARIF = jsonschema.Draft4Validator(json.loads((SCHEMAS / "sarif-2.1.0.json").read_text()))
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
    "a|b`c`*d*_e_[f](javascript:g)@everyone ]]> &amp; {{ 7 * 7 }} $x$ [red]y[/]",
    "\x1b[31mred\x07\x00\x0b\u202eturned\u2066 שלום مرحبا 漢字 \U0001f600 \ud800 line\nbreak",
    "x" * 500,
    "",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An accepted run at 8 bits, a rejected one at 2, and one at 4 bits that the limit lies in the interval of."""
    found = {}
    for name, bits, limit in (("accepted", 8, 1.1), ("rejected", 2, 1.1), ("inconclusive", 4, 1.03)):
        found[name] = tmp_path_factory.mktemp("runs") / name
        settings = (f"edit.plan.bitwidth={bits}", f"eval.max_pm_ratio={limit}", "dataset.final_n=8")
        arguments = [part for setting in settings for part in ("--set", setting)]
        assert main(["run", "--demo", "-q", *arguments, "--out", str(found[name])]) == (name != "accepted")
    return found


@pytest.fixture(params=["accepted", "rejected", "inconclusive"])
def run(request: pytest.FixtureRequest, folders) -> SavedReport:
    return SavedReport.read(folders[request.param])


def render(runs: Sequence[SavedReport], format_: str) -> str:
    return next(each for each in FORMATS if each.name == format_).render(runs)


def rendered(folder: Path, format_: str) -> str:
    return render([SavedReport.read(folder)], format_)


# -- real reports ------------------------------------------------------------------------------------------------------


def test_a_run_writes_a_page_beside_the_report(folders) -> None:
    folder = folders["rejected"]
    assert (folder / "report.html").read_text() == render_html(read_report(folder), folder)
    jsonschema.validate(read_report(folder), json_schema())


def test_the_page_of_a_saved_model_has_its_size(invarlock) -> None:
    settings = ("output.save_model=true", "guards.order=[invariants]", "dataset.preview_n=1", "dataset.final_n=4")
    invarlock("run", "--demo", *(word for each in settings for word in ("--set", each)), "--out", "saved")
    saved = Path("saved").absolute()
    page = (saved / "report.html").read_text()
    assert page == render_html(read_report(saved), saved)
    size = SavedReport.read(saved).saved_bytes
    assert size and f"<dt>saved</dt><dd><bdi>{describing.shown_bytes(size)}</bdi></dd>" in re.sub(r"\s+", " ", page)


def test_the_terminal_shows_what_the_run_printed(invarlock, folders) -> None:
    printed = invarlock("run", "--demo", "--set", "edit.plan.bitwidth=2", "--set", "dataset.final_n=8", "--out", "out")
    done = invarlock("report", "out")
    assert done.code == 0
    assert done.out == printed.out.rpartition("report   ")[0]
    assert done.out.startswith("REJECTED (rollback): decided by primary metric\n")


def test_an_inconclusive_run_says_in_its_first_line_what_would_decide(invarlock, folders) -> None:
    settings = ("--set", "edit.plan.bitwidth=4", "--set", "eval.max_pm_ratio=1.03")
    done = invarlock("run", "--demo", *settings, "--set", "dataset.final_n=8", "--out", "out")
    assert done.code == 1
    first = done.out.splitlines()[0]
    said = re.fullmatch(
        r"INCONCLUSIVE \(rollback\): 8 windows tell ratios of at most (\S+) or at least (\S+) from the limit 1\.03; "
        r"--set (dataset\.final_n=\d+) would decide",
        first,
    )
    assert said is not None, first
    report = read_report(Path("out"))
    undecided, (low, high) = report["metrics"]["primary"]["undecided"], report["metrics"]["primary"]["ci"]
    assert report["verdict"]["ending"] == "inconclusive" and report["verdict"]["accepted"] is False
    assert low <= 1.03 < high
    assert (said[1], said[2]) == (f"{undecided['below']:.4g}", f"{undecided['above']:.4g}")
    assert report["model"]["restored"] is True
    again = invarlock("run", "--demo", *settings, "--set", said[3], "--out", "again")
    assert not again.out.startswith("INCONCLUSIVE"), again.out


def test_every_rendering_names_an_inconclusive_verdict(folders) -> None:
    run = folders["inconclusive"]
    assert rendered(run, "markdown").startswith("# INCONCLUSIVE: inconclusive\n\nThe edit was not accepted: ")
    assert "Inconclusive" in Page(rendered(run, "html")).text
    suite = ElementTree.fromstring(rendered(run, "junit"))[0]
    (failure,) = suite.iter("failure")
    assert failure.get("type") == "inconclusive" and "dataset.final_n=" in (failure.text or "")


def test_markdown_tells_verdict_suspects_figures_and_guards(folders) -> None:
    text = rendered(folders["rejected"], "markdown")
    assert text.startswith("# REJECTED: rejected\n\nThe edit was rejected: primary metric called for rollback.\n")
    assert "- suspect: model.layers.0.self_attn.v_proj (reconstruction: " in text
    assert re.search(r"\| ratio, 95 % interval \| \S+ to \S+ \| upper end at most 1.1 \| no \|", text)
    for row in (line for line in text.splitlines() if line.startswith("|")):
        assert row.endswith("|")
    assert "The edit was accepted: no guard objected." in rendered(folders["accepted"], "markdown")


def test_a_page_shows_verdict_plots_and_figures_and_loads_nothing(run: SavedReport) -> None:
    page = Page(render([run], "html"))
    plots = [plot for plot in plots_of(run.report) if plot.svg]
    assert page.text_of("h1") == [describing.sentence(run.report.verdict)]
    assert len(page.found["svg"]) == len(plots) + 1 == 3 + 3, "all but equal bits, and the time of the stages"
    assert "Bits per weight: " in page.text
    assert all(measure.value in page.text for measure in describing.measures(run.report.metrics))
    assert all(guard.message in page.text for guard in run.report.guards)
    assert "not measured" not in page.text_of("figcaption")
    for attributes in page.attributes:
        assert not {"src", "srcset", "action", "onclick", "onload"} & attributes.keys()
        assert attributes.get("href", attributes.get("xlink:href", "#")).startswith(("#", "data:,"))
    ids = [attributes["id"] for attributes in page.attributes if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_page_answers_in_the_order_of_the_questions(folders) -> None:
    page = Page(rendered(folders["rejected"], "html"))
    headings = page.text_of("h2")
    assert headings[:6] == [
        "Limits that were broken", "What next", "Suspects", "Guards", "What the edit did", "All figures",
    ]  # fmt: skip
    assert page.text_of("dt")[:6] == ["when", "command", "model", "edit", "size", "saved"]
    size = page.text_of("dd")[4]
    assert re.fullmatch(r"3.67 MB \(32 bits .*\) before, 0.73 MB \(6.318 bits .*\) after, scales not counted", size)
    broken, limited, unlimited = (
        page.text_of("table")[0],
        *(
            table
            for table in page.text_of("table")
            if "Figures of the outputs, each" in table or "without a limit" in table
        ),
    )
    assert "KL divergence, mean" in broken and "yes" not in broken
    assert "margin" not in limited and "margin" in unlimited
    accepted = Page(rendered(folders["accepted"], "html"))
    assert accepted.text_of("h2")[:3] == ["Limits", "Guards", "What the edit did"], "no empty card"
    assert "All 7 limits on the outputs held." in accepted.text


def test_the_command_stands_in_the_report(invarlock, config) -> None:
    path = config()
    assert invarlock("run", "-c", path, "--out", "an out").code == 0
    assert read_report(Path("an out"))["command"] == f"invarlock run -c {path} --out 'an out'"


def test_what_has_nothing_to_show_is_named_and_not_drawn(invarlock) -> None:
    paths = ("--baseline", DEMO / "checkpoint", "--subject", DEMO / "checkpoint", "--dataset", DEMO / "text.jsonl")
    assert (
        invarlock("compare", *paths, "--set", "dataset.final_n=4", "--set", "dataset.seq_len=32", "--out", "o").code
        == 0
    )
    drawn = [plot.key for plot in plots_of(SavedReport.read(Path("o")).report) if plot.svg]
    assert drawn == []
    page = Page(rendered(Path("o"), "html"))
    assert [len(page.found["svg"]), page.text_of("figcaption")[0][:12]] == [1, "In the order"]
    assert "Not drawn: The weights: the same before and after the edit." in page.text


def test_a_weight_is_drawn_in_its_own_block() -> None:
    names = [
        "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.0.norm", "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.experts.3.up_proj", "model.norm", "lm_head",
    ]  # fmt: skip
    weights = [EditedWeight(name=name, change="changed", parameters=1, device="cpu") for name in names]
    places = [point.place for point in points(weights, dict.fromkeys(names, 0.5))]
    assert places == [-1, 0, 0.5, 1, 2, 3, 3.5]


def test_both_sides_of_a_spectrum_are_visible_where_they_are_equal() -> None:
    values = [3.0, 2.0, 1.0]
    equal, other = SpectrumChange("a", values, values), SpectrumChange("a", values, [3.0, 2.0, 1.5])
    assert [equal.differences, other.differences] == [[0, 0, 0], [0, 0, 0.5]]
    svg = drawing.drawn("s", "t", drawing.spectrum, equal, heights=(2, 1))
    rings, squares = (re.findall(rf'<use [^>]*style="[^"]*stroke: var\(--plot-{side}\)', svg) for side in (0, 1))
    assert len(rings) == len(squares) == 3
    assert "fill: none; stroke: var(--plot-0)" in svg or "fill-opacity: 0" in svg


def test_the_same_report_gives_the_same_page(folders) -> None:
    run = SavedReport.read(folders["rejected"])
    assert render([run], "html") == render([run], "html")


def test_junit_has_a_test_for_each_guard_the_metric_and_the_predictions(run: SavedReport) -> None:
    text = render([run], "junit")
    JUNIT.validate(text)
    suite = ElementTree.fromstring(text)[0]
    names = [f"guard {guard['name']}" for guard in run.values["guards"]] + ["primary metric", "predictions"]
    assert [case.get("name") for case in suite] == names
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    objecting = {"accepted": [], "rejected": ["primary metric", "predictions"], "inconclusive": ["primary metric"]}
    assert failed == objecting[run.values["verdict"]["ending"]]
    assert suite.get("failures") == str(len(failed))


def test_junits_messages_are_short_and_its_bodies_long(folders) -> None:
    suite = ElementTree.fromstring(rendered(folders["rejected"], "junit"))[0]
    failures = [case.find("failure") for case in suite if case.find("failure") is not None]
    assert all(len(failure.get("message")) <= 100 < len(failure.text) for failure in failures)
    decided = failures[0].text
    assert "the interval's upper end is above the limit 1.1\nsuspect: model.layers.0" in decided
    assert "\nnext: one more bit halves the rounding error: --set edit.plan.bitwidth=3" in decided


def test_sarif_marks_as_error_only_what_decided(folders) -> None:
    results = json.loads(rendered(folders["rejected"], "sarif"))["runs"][0]["results"]
    errors = [each["message"]["text"] for each in results if each["level"] == "error"]
    assert [text.split(":")[0] for text in errors] == ["primary metric"]


def test_junit_fails_warnings_only_where_the_run_was_strict(folders) -> None:
    report = read_report(folders["rejected"])
    report["verdict"]["strict"] = True
    suite = ElementTree.fromstring(render([SavedReport(report, Path("run"))], "junit"))[0]
    assert "guard spectral" in [case.get("name") for case in suite if case.find("failure") is not None]


def test_junit_tells_errors_and_what_was_not_run(folders) -> None:
    report = read_report(folders["accepted"])
    report["guards"][0] |= {"passed": False, "action": "abort", "error": "Traceback\n  here"}
    report["guards"][1] |= {"passed": None, "message": "not run: guards.fail_fast"}
    report["verdict"]["findings"], report["metrics"]["primary"] = [], None
    text = render([SavedReport(report, Path("run"))], "junit")
    JUNIT.validate(text)
    suite = ElementTree.fromstring(text)[0]
    assert suite[0].find("error").text == "Traceback\n  here"
    assert [case.get("name") for case in suite if case.find("skipped") is not None] == [
        f"guard {report['guards'][1]['name']}", "primary metric", "predictions",
    ]  # fmt: skip


def test_sarif_has_what_objects_and_the_suspects(run: SavedReport) -> None:
    log = json.loads(render([run], "sarif"))
    SARIF.validate(log)
    results = log["runs"][0]["results"]
    verdict = run.values["verdict"]
    objecting = [finding["source"] for finding in verdict["findings"] if finding["action"] != "continue"]
    suspects = [suspect["module"] for suspect in verdict["suspects"]]
    found = [result["locations"][0]["logicalLocations"][0]["fullyQualifiedName"] for result in results]
    assert found == objecting + suspects
    assert bool(found) != verdict["accepted"]


def test_json_is_the_report(run: SavedReport) -> None:
    assert json.loads(render([run], "json")) == run.values


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    [("r.html", "<!doctype html>"), ("r.md", "# ACCEPTED"), ("r.xml", "<?xml"), ("r.sarif", "{"), ("r.txt", "ACCEPTED")],
)  # fmt: skip
def test_the_name_of_the_output_says_the_format(invarlock, folders, name: str, start: str) -> None:
    done = invarlock("report", folders["accepted"] / "report.json", "-o", f"new/{name}")
    assert (done.code, done.out, done.err) == (0, "", "")
    assert Path("new", name).read_text().startswith(start)
    assert [path.name for path in Path("new").iterdir()] == [name]


def test_each_format_has_a_name_and_a_suffix_of_its_own() -> None:
    assert len({each.name for each in FORMATS}) == len({each.suffix for each in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no report"), ("{", "is not a report"), ("[]", "format_version is None"), ("9" * 5000, "is not a report"),
        ('{"format_version": "report-v9"}', "'report-v9'"), ("[" * 100_000, "is not a report"), ("\udcff", "is not a report"),
    ],
)  # fmt: skip
def test_what_is_no_report_is_one_line(invarlock, content: str | None, said: str) -> None:
    Path("run").mkdir()
    if content is not None:
        Path("run/report.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    done = invarlock("report", "run")
    assert done.code == 2
    assert said in done.err
    assert done.err.count("\n") == 1


def test_an_output_that_cannot_be_written_is_one_line(invarlock, folders) -> None:
    Path("file").touch()
    done = invarlock("report", folders["accepted"], "-o", "file/report.html")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_the_examples_for_continuous_integration_are_yaml_and_their_commands_run(invarlock, folders) -> None:
    page = (Path(__file__).parent.parent / "docs" / "ci.md").read_text()
    assert all(yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL))
    commands = re.findall(r"invarlock report runs/gate ([^;>\n]*)", page)
    assert len(commands) == 5
    for command in commands:
        assert invarlock("report", folders["rejected"], *command.split()).code == 0, command
    assert {path.name for path in Path("runs/gate").iterdir()} == {"junit.xml", "report.sarif"}


# -- side by side ------------------------------------------------------------------------------------------------------


def test_the_best_accepted_run_is_marked(invarlock, folders, config) -> None:
    four = config(edit={"plan": {"bitwidth": 4, "scope": "all"}}, output={"save_model": True, "format": "dequantized"})
    assert invarlock("run", "-c", four, "--out", "four").code == 0
    paths = [folders["accepted"], folders["rejected"], Path("four")]
    done = invarlock("report", *paths)
    assert done.code == 0
    assert done.out.startswith("best     four\n")
    table = json.loads(render([SavedReport.read(path) for path in paths], "json"))
    assert table["runs"][table["best"]] == "four"
    rows = dict(table["rows"])
    assert [float(bits) for bits in rows["bits a parameter"]] == pytest.approx([11.45, 6.318, 8.03], abs=0.01)
    assert rows["saved artifacts"][:2] == ["not saved"] * 2
    assert rows["saved artifacts"][2].endswith("MB")
    assert rows["plan: bitwidth"] == ["8", "2", "4"]
    assert rows["guard spectral"] == ["continue", "warn", "not measured"]
    page = Page(render([SavedReport.read(path) for path in paths], "html"))
    assert any("four (best)" in " ".join(heading.split()) for heading in page.text_of("th"))
    assert "four (best)" in render([SavedReport.read(path) for path in paths], "markdown")


def test_several_runs_have_links_colours_a_plot_and_folded_rows(invarlock, folders) -> None:
    done = invarlock("report", *folders.values(), "-o", "below/side.html")
    assert done.code == 0, done.err
    page = Page(Path("below/side.html").read_text())
    links = [attributes["href"] for attributes in page.attributes if attributes.get("href", "").endswith("report.html")]
    assert [Path("below", link).resolve() for link in links] == [
        (folder / "report.html").resolve() for folder in folders.values()
    ]
    tags = [attributes["class"] for attributes in page.attributes if attributes.get("class", "").startswith("tag")]
    assert tags == ["tag continue", "tag rollback", "tag rollback"]
    assert len(page.found["svg"]) == 1
    rows, folded = page.text_of("table")[:2]
    assert "plan: bitwidth" in rows and "plan: symmetric" not in rows and "plan: symmetric" in folded
    assert "the same in all: plan: symmetric yes, " in invarlock("report", *folders.values()).out


@pytest.mark.parametrize("format_", ["junit", "sarif"])
def test_several_runs_are_several_suites(folders, format_: str) -> None:
    text = render([SavedReport.read(folder) for folder in folders.values()], format_)
    if format_ == "junit":
        JUNIT.validate(text)
        assert [suite.get("name") for suite in ElementTree.fromstring(text)] == [*folders]
    else:
        SARIF.validate(json.loads(text))
        assert len(json.loads(text)["runs"]) == len(folders)


def test_equal_bits_are_decided_by_the_ratio_and_rejected_runs_never_win(folders) -> None:
    report = read_report(folders["accepted"])
    worse = copy.deepcopy(report)
    worse["metrics"]["primary"]["ratio"] = 1.05
    unmeasured = copy.deepcopy(report)
    unmeasured["model"]["description"] = {}
    runs = [
        SavedReport(entry, Path(name))
        for name, entry in (("worse", worse), ("unmeasured", unmeasured), ("good", report))
    ]
    assert json.loads(render(runs, "json"))["best"] == 2
    none = [
        SavedReport(read_report(folders["rejected"]), Path("a")),
        SavedReport(read_report(folders["rejected"]), Path("b")),
    ]
    assert json.loads(render(none, "json"))["best"] is None
    assert "none was accepted" in render(none, "terminal")


# -- sections of plugins -----------------------------------------------------------------------------------------------

SECTION = {
    "title": "Costs <b>",
    "text": "per | token",
    "columns": ["what", "€"],
    "rows": [["now", 1.5], ["then", None]],
}


def sections(returned: Any) -> str:
    return (
        f"from invarlock import hookimpl\n@hookimpl\ndef invarlock_report_sections(report):\n    return {returned!r}\n"
    )


def test_a_plugin_adds_a_section_that_stays_without_it(invarlock, module, config) -> None:
    module("costs", sections([SECTION]))
    printed = invarlock("run", "-c", config(), "-p", "costs", "--out", "out")
    assert printed.code == 0, printed.err
    report = read_report(Path("out"))
    jsonschema.validate(report, json_schema())
    assert report["sections"] == [{"source": "hooks costs", **SECTION}]
    assert "Costs <b> (by hooks costs)\nper | token\n" in printed.out
    assert "Costs \\<b>" in rendered(Path("out"), "markdown")
    assert "| now | 1.5 |" in rendered(Path("out"), "markdown")
    page = Page(rendered(Path("out"), "html"))
    assert "Costs <b>" in page.text_of("h2")
    assert "per | token" in page.text_of("p")


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ({"title": "x"}, "a section is a str"), ([{"text": "x"}], "needs a 'title'"), ([{"title": "x", "html": ""}], "'html'"),
        ([{"title": "x", "columns": ["a"], "rows": [[1, 2]]}], "as many cells"), ([{"title": "x", "rows": "ab"}], "list of lists"),
    ],
)  # fmt: skip
def test_a_section_of_another_form_names_its_plugin_and_writes_nothing(
    invarlock, module, config, returned, said
) -> None:
    module("costs", sections(returned))
    done = invarlock("run", "-c", config(), "-p", "costs", "--out", "out")
    assert done.code == 3
    assert "costs: invarlock_report_sections: " in done.err and said in done.err
    assert not Path("out").exists()


# -- hostile and odd reports -------------------------------------------------------------------------------------------


def poisoned(value: Any, text: str) -> Any:
    """A report with this text in the place of every text and every key that a model or plugin chooses."""
    if isinstance(value, dict):
        return {key if key in KEYS else key + text: poisoned(entry, text) for key, entry in value.items()}
    if isinstance(value, list):
        return [poisoned(entry, text) for entry in value]
    return text if isinstance(value, str) else value


KEYS = {*json_schema()["properties"]} | {
    key for definition in json_schema()["$defs"].values() for key in definition.get("properties", ())
} | {"suspects", "spectra", "before", "after", "module", "families", "parameters", "dtype"}  # fmt: skip


@pytest.mark.parametrize("format_", FORMAT_NAMES)
@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_and_does_nothing(folders, format_: str, text: str) -> None:
    report = poisoned(read_report(folders["rejected"]), text) | {"format_version": "report-v1"}
    section = {"source": text, "title": text, "text": text, "columns": [text, "b"], "rows": [[text, text]]}
    report |= {"sections": [section], "artifacts": {text: text, "../" + text: text}}
    shown = render([SavedReport(report, Path("folder"))] * (1 if format_ == "json" else 2), format_)
    alone = render([SavedReport(report, Path("folder"))], format_)
    for output in (shown, alone) if format_ != "json" else ():
        output.encode()
        assert not re.search("[\x00-\x08\x0b-\x1f\u202e\u2066]", output)
        if format_ == "html":
            page = Page(output)
            assert len(page.found["script"]) == 1 and "img" not in page.found
            assert cleaned(text) in page.text
        elif format_ == "junit":
            JUNIT.validate(output)
        elif format_ == "sarif":
            SARIF.validate(json.loads(output))
        elif format_ == "markdown":
            assert not re.search(r"(?<!\\)<(?!!-- -->)", output)
            assert "@everyone" not in output


def cleaned(text: str) -> str:
    return re.sub("[\x00-\x08\x0b-\x1f\u202e\u2066\ud800]", "\ufffd", text).strip().split("\n")[0][:400]


@pytest.mark.parametrize("undecided", [None, {}, {"below": None, "above": "x", "message": "\x1b[2J"}])
def test_an_inconclusive_report_without_its_figures_is_shown(folders, undecided: Any) -> None:
    report = read_report(folders["inconclusive"])
    report["metrics"]["primary"]["undecided"] = undecided
    text = render([SavedReport(report, Path("odd"))], "terminal")
    assert text.startswith("INCONCLUSIVE (rollback): ") and "\x1b" not in text


ODD = [
    {}, dict.fromkeys(json_schema()["properties"]), {key: [] for key in json_schema()["properties"]},
    dict.fromkeys(json_schema()["properties"], "nan"), {key: [None, 7, "x", {}] for key in json_schema()["properties"]},
]  # fmt: skip


@pytest.mark.parametrize("format_", FORMAT_NAMES)
@pytest.mark.parametrize("report", ODD, ids=range(len(ODD)))
def test_an_odd_report_is_shown_as_not_measured(report: dict[str, Any], format_: str) -> None:
    text = render([SavedReport(report | {"format_version": "report-v1"}, Path("odd"))], format_)
    if format_ in ("terminal", "markdown", "html"):
        assert "not measured" in text
        assert "NO VERDICT" in text
    if format_ == "junit":
        JUNIT.validate(text)
    if format_ == "sarif":
        SARIF.validate(json.loads(text))


@pytest.mark.parametrize(
    "value",
    [None, "nan", "-inf", 1e308, -5, 10**400, "text", []],
    ids=["null", "nan", "-inf", "1e308", "-5", "huge", "text", "list"],
)
def test_any_value_of_any_figure_is_shown(folders, value: Any) -> None:
    def replaced(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {key: replaced(of_it) for key, of_it in entry.items()}
        if isinstance(entry, list):
            return [replaced(of_it) for of_it in entry]
        return value if isinstance(entry, int | float) else entry

    report = replaced(read_report(folders["rejected"]))
    for format_ in ("html", "terminal", "markdown", "junit", "sarif"):
        assert render([SavedReport(report, Path("odd"))], format_)


def test_thousands_of_modules_and_windows_make_a_page_of_modest_size(folders) -> None:
    report = read_report(folders["rejected"])
    one = report["edit"]["modules"][0]
    report["edit"]["modules"] = [
        one | {"name": f"model.layers.{layer}.mlp.experts.{expert}", "relative_error": expert / 99 + layer / 1000}
        for layer in range(60) for expert in range(99)
    ]  # fmt: skip
    report["metrics"]["windows"] = {
        "tokens": [9] * 5000, "baseline": [9.0] * 5000, "edited": ["nan", "inf", *[10.0] * 4998],
    }  # fmt: skip
    page = render_html(report)
    assert len(page) < 1_500_000
    errors, windows, *_ = plots_of(SavedReport(report).report)
    assert "the most changed of each block and role" in errors.caption
    assert errors.rows[0][0] == "model.layers.59.mlp.experts.98"
    assert errors.left_out == 60 * 99 - len(errors.rows)
    assert "2 windows whose loss is not a finite number" in windows.caption


class Page(HTMLParser):
    """What a page holds: its text, and the elements by name with their text and attributes."""

    VOID = ("meta", "link", "br", "img")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: dict[str, list[str]] = {}
        self.attributes: list[dict[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.setdefault(tag, []).append("")
        self.attributes.append({name: value or "" for name, value in attrs})
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in set(self.open):
            self.found[tag][-1] += data

    def text_of(self, tag: str) -> list[str]:
        return self.found.get(tag, [])


def test_a_report_that_a_format_cannot_hold_is_said_in_one_line(invarlock, config) -> None:
    assert invarlock("run", "-c", config(), "--out", "out").code == 0
    report = read_report(Path("out"))
    report["guards"][0]["metrics"] = "nested"
    # So deep that it can be read and not written; reading has a limit of its own since Python 3.12.
    depth = 900 if sys.version_info < (3, 12) else 1200
    nested = '{"deeper":' * depth + "{}" + "}" * depth
    Path("out/report.json").write_text(json.dumps(report).replace('"nested"', nested))
    done = invarlock("report", "out", "--format", "json")
    assert done.code == 2
    assert done.err.startswith("invarlock: error: out: cannot be shown as json: ")
    assert done.err.count("\n") == 1


def test_a_suffix_that_says_no_format_is_refused(invarlock, config) -> None:
    assert invarlock("run", "-c", config(), "--out", "out").code == 0
    done = invarlock("report", "out", "-o", "report.htm")
    assert (done.code, Path("report.htm").exists()) == (2, False)
    assert "-o report.htm: .htm says no format" in done.err


def test_a_users_matplotlibrc_changes_no_page(invarlock, config) -> None:
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True}):
        done = invarlock("run", "-c", config(), "--out", "out")
    assert (done.code, done.err) == (0, "")
    assert Path("out/report.html").is_file()


def test_text_of_a_plugin_makes_no_heading_list_or_link_of_markdown(invarlock, module, config) -> None:
    module(
        "costs",
        sections([{"title": "Costs", "text": "# ACCEPTED"}, {"title": "1. See", "text": "- https://evil.example"}]),
    )
    assert invarlock("run", "-c", config(), "-p", "costs", "--out", "out").code == 0
    text = rendered(Path("out"), "markdown")
    assert "\n\\# ACCEPTED" in text
    assert "1\\. See" in text
    assert "\n\\- https:<!-- -->//evil.example" in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.layers.0.self_attn.v_proj", "model.layers.0.self_attn.v_proj"), ("1.57 -> 1.6 & -0.5", "1.57 -> 1.6 & -0.5"),
        ("-0.5", "-0.5"), ("n < 5 # see", "n < 5 # see"), ("_a_ b_", r"\_a\_ b\_"), ("*a* `b` [c](d)", r"\*a\* \`b\` \[c\](d)"),
        ("<b>&lt;", r"\<b>\&lt;"), ("> a", r"\> a"), ("# a #1", r"\# a \#1"), ("- a", r"\- a"), ("---", r"\---"), ("1. a", r"1\. a"),
    ],
)  # fmt: skip
def test_markdown_escapes_what_means_something_alone(text: str, shown: str) -> None:
    assert markdown(text) == shown
    rendered = (
        MarkdownIt().enable(["strikethrough", "table"]).renderInline(markdown(text)) if text[0] not in "->#1" else ""
    )
    assert not rendered or html.unescape(rendered) == text
