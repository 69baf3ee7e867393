"""The page in a real browser: that it works, asks for nothing, and can be read by everybody (axe-core)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from invarlock.cli.main import main
from invarlock.reporting.page import render
from invarlock.reporting.reading import SavedReport

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra browser")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("needs a chromium on the path", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The page of an accepted run, of a rejected one, and of both side by side."""
    folder, found = tmp_path_factory.mktemp("pages"), {}
    for name, bits in (("accepted", 8), ("rejected", 2)):
        out = folder / name
        main(["run", "--demo", "-q", "--set", f"edit.plan.bitwidth={bits}", "--out", str(out)])
        found[name] = out / "report.html"
    found["both"] = folder / "both.html"
    found["both"].write_text(render([SavedReport.read(folder / name) for name in ("accepted", "rejected")]))
    return found


class Visit:
    """A page that is open, and what it complained of and asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light", **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, **options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *error: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", ["accepted", "rejected", "both"])
def test_a_page_renders_without_complaint_and_asks_for_nothing(browser, pages, name: str) -> None:
    with Visit(browser, pages[name]) as visit:
        assert visit.page.locator("h1").is_visible()
        assert all(plot.bounding_box()["height"] > 100 for plot in visit.page.locator("svg").all())
        assert visit.complaints == []
        assert [url for url in visit.requests if not url.startswith("data:")] == [pages[name].as_uri()]


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["accepted", "rejected", "both"])
def test_axe_finds_nothing_and_the_page_is_no_wider_than_the_screen(browser, pages, name, scheme, width) -> None:
    # axe is put into the page, which the page's own policy forbids.
    with Visit(browser, pages[name], width, scheme, bypass_csp=True) as visit:
        visit.page.eval_on_selector_all("details", "all => all.forEach(details => { details.open = true })")
        results = axe.Axe().run(visit.page)
        assert results.violations_count == 0, results.generate_report()
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= width


def test_tables_fold_and_sort_by_keyboard(browser, pages) -> None:
    with Visit(browser, pages["rejected"]) as visit:
        details = visit.page.locator("figure details").first
        rows = details.locator("tbody tr")
        assert not rows.first.is_visible()
        details.locator("summary").focus()
        visit.page.keyboard.press("Enter")
        assert rows.first.is_visible()
        heading = details.locator("th", has_text="relative error").first
        heading.locator("button").focus()
        for key, order in (("Enter", "ascending"), ("Space", "descending")):
            visit.page.keyboard.press(key)
            assert heading.get_attribute("aria-sort") == order
            values = [float(text) for text in details.locator("tbody td:nth-child(4)").all_inner_texts()]
            assert values == sorted(values, reverse=order == "descending")
            assert len(values) == 28
        assert visit.complaints == []


def test_dark_and_light_differ_and_print_unfolds(browser, pages) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    with Visit(browser, pages["accepted"]) as light, Visit(browser, pages["accepted"], scheme="dark") as dark:
        assert light.page.evaluate(colour) != dark.page.evaluate(colour)
        assert light.page.evaluate(
            "dispatchEvent(new Event('beforeprint')), !document.querySelector('details:not([open])')"
        )


def test_the_pages_own_policy_stops_a_script_that_got_in(browser, pages, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(pages["accepted"].read_text().replace("</main>", "<script>window.got = true</script></main>"))
    with Visit(browser, broken) as visit:
        assert visit.page.evaluate("window.got") is None
