"""Whatever a run or a comparison ends with, its report is read back: by ``verify``, ``report`` and the schema."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jsonschema
import pytest
from conftest import read_report
from endings import COMPARED, GUARDED, end
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from invarlock.reporting.formats import FORMATS, ReportFormat
from invarlock.reporting.reading import SavedReport
from invarlock.reporting.report import json_schema

EXPECTED = {
    "accepted": (True, 0), "warned strictly": (True, 1), "rejected": (False, 1), "rejected at every width": (False, 1),
    "failing fast": (False, 1), "not ready": (False, 1), "prepare raises": (False, 3), "a guard failed": (False, 3),
    "a contradiction": (False, 3), "not measured": (True, 0), "a huge message": (True, 0), "streamed": (True, 0),
    "the subject's losses not finite": (False, 1), "an infinite ratio": (False, 1), "weights alone": (True, 0),
    "unreadable windows": (False, 1),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("endings")
    with pytest.MonkeyPatch.context() as monkeypatch:
        return {name: end(root, name, monkeypatch) for name in (*GUARDED, *COMPARED)}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_report_is_verified_and_of_the_schema(invarlock, folders: dict[str, Path], name: str) -> None:
    report = read_report(folders[name])
    jsonschema.validate(report, json_schema())
    assert (report["verdict"]["accepted"], report["verdict"]["exit_code"]) == EXPECTED[name]
    done = invarlock("verify", folders[name])
    assert (done.code, done.err) == (0, ""), done.out
    assert done.out.splitlines()[-1] == "UNSIGNED: consistent with itself, which a forger can be, too"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@pytest.mark.parametrize("name", EXPECTED)
def test_every_report_is_shown_in_every_format(folders: dict[str, Path], name: str, form: ReportFormat) -> None:
    shown = form.render([SavedReport.read(folders[name])])
    shown.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    if form.name == "json":
        assert json.loads(shown) == read_report(folders[name])
    if form.name == "terminal":
        assert not re.search("^ACCEPTED", shown) or read_report(folders[name])["verdict"]["accepted"]
        assert "\nACCEPTED" not in shown


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_all_of_them_are_shown_side_by_side(folders: dict[str, Path], form: ReportFormat) -> None:
    shown = form.render([SavedReport.read(folder) for folder in folders.values()])
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)


def test_infinite_figures_are_read_as_they_were(folders: dict[str, Path]) -> None:
    report = read_report(folders["an infinite ratio"])
    assert report["metrics"]["primary"]["ratio"] == "inf"
    assert report["metrics"]["primary"]["ci"][1] == "inf"
    run = SavedReport.read(folders["an infinite ratio"])
    assert run.report.metrics.primary is not None and run.report.metrics.primary.ratio == math.inf
    assert all("infinite" in form.render([run]) for form in FORMATS if form.name in ("markdown", "html", "terminal"))


def test_a_model_card_shows_hostile_text_and_does_nothing(folders: dict[str, Path], invarlock, tmp_path: Path) -> None:
    card = ModelCard.load(folders["warned strictly"] / "model" / "README.md")
    assert "base_model" not in card.data.to_dict()
    text = (folders["warned strictly"] / "model" / "README.md").read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "{{7\\*7}}" in text
    drawn = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert "<script" not in drawn and "<img" not in drawn and "href" not in drawn and "<strong>" not in drawn
    assert drawn.count("<h1>") == 1 and drawn.count("<hr") == 0
