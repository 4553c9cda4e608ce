"""The page of ``lora-ext report`` in headless Chromium: wide, narrow, light, dark, without scripts, printed."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support import browser
from support.optional import matplotlib  # noqa: F401
from support.report_results import COMPARE, METHODS

from lora_ext.tasks.report import charts, write_report
from lora_ext.tasks.report.charts import Bar

pytestmark = [pytest.mark.cpu_only("is about files"), pytest.mark.full]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Page]:
    if browser.executable() is None:
        pytest.skip(browser.MISSING)
    tab = browser.Page(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_and_has_the_colours_of_its_theme(tab: browser.Page, page: Path, width: int):
    pictures = {}
    for dark in (False, True):
        tab.open(page, width, dark=dark)
        assert tab.errors == []
        assert {url.partition(":")[0] for url in tab.requests} == {"file", "data"}
        assert [url for url in tab.requests if url.startswith("file")] == [page.resolve().as_uri()]
        assert tab.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        # Nothing sticks out of the page, except in an element that scrolls.
        sticks_out = "e => e.getBoundingClientRect().right > innerWidth + 0.5 && !e.closest('.scroll')"
        found = tab.evaluate(f"[...document.body.querySelectorAll('*')].filter({sticks_out}).map(e => e.outerHTML)")
        assert found == []
        assert tab.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        pictures[dark] = tab.screenshot()
        codes = pictures[dark].astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)  # as CSS writes colours
        for colour in ("--c0", "--c1", "--ground", "--ink"):
            text = tab.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('{colour}')").strip()
            found = int((codes == int(text[1:], 16)).sum())
            assert found > (200 if colour != "--ground" else 0.3 * codes.size), (dark, colour, found)
        assert np.isin([0x440154, 0xFDE725], codes).all(), "the colours of the heat maps"
    light, dark = (pictures[key].mean() for key in (False, True))
    assert light > 200 > 90 > dark
    # Coloured charts are spread over the whole page.
    coloured = np.ptp(pictures[False], axis=-1) > 60
    parts = np.array_split(coloured.any(axis=1), 8)
    assert sum(part.any() for part in parts) >= 6


def test_a_heading_sorts_its_table(tab: browser.Page, results: Path, page: Path):
    content = json.loads((results / COMPARE).read_text())
    trained = {row["label"]: row["trained_parameters"] for row in content["methods"]}
    tab.open(page)
    names = "[...document.querySelectorAll('table.sortable')[0].tBodies[0].rows].map(r => r.cells[0].textContent)"
    press = "document.querySelectorAll('table.sortable')[0].querySelectorAll('th button')[1].click()"
    assert tab.evaluate(names) == METHODS
    tab.evaluate(press)
    assert tab.evaluate(names) == sorted(trained, key=trained.get)
    tab.evaluate(press)
    assert tab.evaluate(names) == sorted(trained, key=trained.get, reverse=True)
    sorted_by = "[...document.querySelectorAll('[aria-sort]')].map(e => [e.cellIndex, e.getAttribute('aria-sort')])"
    assert tab.evaluate(sorted_by) == [[1, "descending"]]


@pytest.mark.parametrize("scripts", [True, False])
def test_marks_of_a_chart_show_their_figures_under_the_pointer(tab: browser.Page, page: Path, scripts: bool):
    tab.open(page, scripts=scripts)
    under = """[...document.querySelectorAll("svg.chart, svg.bars")].flatMap(svg => {
        svg.scrollIntoView({block: "center"});
        return [...svg.querySelectorAll("title")].map(title => {
            const box = title.parentElement.getBoundingClientRect();
            const found = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
            return [title.textContent, found.querySelector("title")?.textContent];
        });
    })"""
    titles = tab.evaluate(under)
    assert len(titles) > 100 and all(found for _, found in titles)
    # Where marks overlap, only the one on top shows its figures.
    assert sum(title == found for title, found in titles) > 0.7 * len(titles)
    assert any(title.startswith("lora:r=2: ") and " parameters" in title for title, _ in titles)


def test_a_whisker_hides_no_figure(tab: browser.Page, tmp_path: Path):
    bars = [Bar("a", [(5.0, "five")], "5", quartiles=(1.0, 9.0)), Bar("b", [(10.0, "ten")], "10")]
    css = (Path(charts.__file__).parent / "page.css").read_text()
    chart = tmp_path / "chart.html"
    chart.write_text(f"<style>{css}</style><body>{charts.bar_chart('bars', bars).svg}")
    tab.open(chart)
    middle = """(() => {
        const box = document.querySelector("title").parentElement.getBoundingClientRect();
        return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2).textContent;
    })()"""
    assert tab.evaluate(middle) == "five"


def test_it_can_be_read_without_scripts_and_on_paper(tab: browser.Page, page: Path):
    tab.open(page, scripts=False)
    assert tab.errors == []
    assert tab.evaluate("document.querySelectorAll('th button').length") == 0
    assert tab.evaluate("document.querySelectorAll('section').length") == 5
    tab.open(page)
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.querySelectorAll('details:not([open])').length") == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate("document.querySelectorAll('details[open]').length") == 0
    pages = base64.b64decode(tab.call("Page.printToPDF", printBackground=True)["data"])
    assert pages.startswith(b"%PDF")


def test_the_policy_stops_a_script_that_gets_in(tab: browser.Page, results: Path, tmp_path: Path):
    page = write_report(results, tmp_path / "page.html", title="x")
    page.write_text(page.read_text().replace("<h1>x</h1>", "<h1>x<script>document.title = 'run'</script></h1>", 1))
    tab.open(page)
    assert tab.evaluate("document.title") == "x"
    assert any("Content Security Policy" in error for error in tab.errors)
