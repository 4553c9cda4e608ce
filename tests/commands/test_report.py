"""``lora-ext report``: every figure is on the page, files' content stays text, nothing is loaded, it looks right."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import results
from support.optional import Image, matplotlib  # noqa: F401

from lora_ext.commands import main

pytestmark = [pytest.mark.cpu_only("is about files"), pytest.mark.full]


class Page(HTMLParser):
    """A document whose elements are closed in the right order: its elements, texts, and tables by caption."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.text, self.style, self._caption, self._open = "", "", "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self._open

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.style += data
            return
        self.text += data
        if "caption" in self._open:
            self._caption += data
        elif {"td", "th"} & {*self._open}:
            self.tables[self._caption][-1][-1] += data


def save(folder: Path, **contents: dict[str, Any]) -> Path:
    """Saves results as ``folder/<name>/<file>``; returns the folder."""
    files = {"run": "metrics.json", "chat": "metrics.json", "compare": "compare.json", "plan": "plan.json"}
    for name, content in contents.items():
        (folder / name).mkdir(parents=True)
        (folder / name / files[name]).write_text(json.dumps(content))
    return folder


def everything() -> dict[str, dict[str, Any]]:
    return {
        "run": results.classification(),
        "chat": results.causal_lm(),
        "compare": results.comparison(),
        "plan": results.plan(),
    }


def report(folder: Path, *options: str) -> Page:
    assert main(["report", str(folder), *options]) == 0
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def folder(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds of results, with an analysis of real adapters, and their page."""
    folder = save(tmp_path_factory.mktemp("results") / "week-3", **everything())
    adapters = ["--adapter", str(files / "four"), str(files / "six"), "--base", str(files / "base")]
    assert main(["analyze", *adapters, "--out", str(folder / "analysis")]) == 0
    assert main(["report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(folder / "report.html")


def drawn(page: Page) -> list[ElementTree.Element]:
    """Returns the elements of all figures of a page; each figure is an image of its own."""
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    figures = [ElementTree.fromstring(base64.b64decode(source.partition(",")[2])) for source in sources]
    return [element for figure in figures for element in figure.iter()]


def names(elements: list[ElementTree.Element]) -> set[str]:
    return {element.tag.partition("}")[2] for element in elements}


# --- the document -----------------------------------------------------------------------------------------------------


def test_the_page_loads_nothing(page):
    """And runs nothing; the browser below shows that its policy forbids both."""
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len({*ids}) == 5
    shapes = [shape for shape in drawn(page) if shape.tag.startswith("{http://www.w3.org/2000/svg}")]
    assert len(shapes) > 500 and not {"script", "link", "iframe", "object"} & ({*dict(page.elements)} | names(shapes))
    for attributes in (*(attributes for _, attributes in page.elements), *(shape.attrib for shape in shapes)):
        for name, value in attributes.items():
            assert not name.startswith("on") and "://" not in value, (name, value)
            assert not name.endswith(("href", "src")) or value.startswith(("#", "data:image/")), (name, value[:40])
    for text in (page.style, *(shape.text or "" for shape in shapes)):
        assert "url(" not in text and "@import" not in text
    assert {attributes.get("href", "#")[1:] for _, attributes in page.elements} == {"", *ids}
    (policy,) = [attributes["content"] for _, attributes in page.elements if attributes.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


def test_the_parts_and_their_order(page, tmp_path):
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert headings[:3] == ["Comparison of methods", "What the adapters have learnt", "Predicted memory"]
    assert headings[3:] == ["A run of lora"] * 2
    assert re.findall(r'<a href="#part-(\d)">', page.source) == ["1", "2", "3", "4", "5"]
    assert "<title>week-3</title>" in page.source and "<h1>week-3</h1>" in page.source
    # Runs below a comparison are in its table.
    save(tmp_path, compare=results.comparison())
    save(tmp_path / "compare" / "runs", run=results.classification())
    found = report(tmp_path, "--title", "Week 3 & 4").source
    assert found.count("<h2>") == 1 and "<h1>Week 3 &amp; 4</h1>" in found and "<nav" not in found
    (tmp_path / "compare" / "compare.json").unlink()  # an unfinished comparison
    assert "A run of lora" in report(tmp_path).text


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_results(page):
    for caption, rows in results.ROWS.items():
        assert all(row in page.tables[caption] for row in rows), page.tables[caption]
    assert all(fact in page.text for fact in results.FACTS)
    assert page.tables["Methods"][0][2:5] == ["accuracy, %", "spread", "minus baseline (95 %)"]
    texts = {element.text for element in drawn(page) if element.tag.endswith("}text")}
    assert {"bitfit", "75,264", "75,000", "r = 16", "rank r", "test accuracy (%)"} <= texts
    assert "9,984" not in texts  # another number of parameters


def test_a_plan_and_an_analysis(folder, page):
    result = json.loads((folder / "plan" / "plan.json").read_text())
    memory, peaks = page.tables["Memory of a step, and checkpoints"], [run["peak"] for run in result["runs"].values()]
    assert all(row in memory for row in results.PLAN) and len(memory) == 11
    assert ["peak", *(f"{peak / 1e6:.0f} MB" for peak in peaks)] in memory
    assert "demo: bert, 22,714,371 parameters, classification; float32 weights, adamw, 16 x 128 tokens" in page.text
    assert "lora fits" in page.text and "full does not fit into 499 MB (without --reserve): 607 MB" in page.text
    content = json.loads((folder / "analysis" / "analysis.json").read_text())
    layers = page.tables["Every layer, largest change first"][1:]
    assert len(layers) == 10  # four of one adapter, six of the other
    for update in content["updates"]:
        (row,) = [row for row in layers if row[:2] == [update["layer"], f"{update['adapter']}"]]
        assert row[3] == f"{update['norm']:.4g}" and row[-1] == f"{update['amplification']:.4g}"
    changes = [float(row[4]) for row in layers]
    assert changes == sorted(changes, reverse=True)
    phi = content["similarity"][0]["phi"]
    assert ["1, 2", "lora_A", "4", "4", f"{phi[3][3]:.4g}"] in [
        row[:5] for row in page.tables["Similarity of subspaces"]
    ]
    assert sum(element.tag.endswith("}image") for element in drawn(page)) >= 4  # heat maps


# --- files from elsewhere ---------------------------------------------------------------------------------------------

HOSTILE = '</td></title><script>alert(1)</script><img src=x onerror=alert(2)>" &amp; $\\frac{ \x00\x1b'


def hostile(value: Any) -> Any:
    """Puts the hostile text into all texts, except those that choose what is shown."""
    if isinstance(value, dict):
        kept = ("task", "metric", "method", "date")
        return {key: item if key in kept else hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return f"{value} {HOSTILE}" if isinstance(value, str) else value


def test_content_of_files_stays_text(folder, tmp_path):
    contents = everything()
    save(tmp_path, **{name: hostile(content) for name, content in contents.items()})
    analysis = hostile(json.loads((folder / "analysis" / "analysis.json").read_text()))
    (tmp_path / "analysis.json").write_text(json.dumps(analysis))
    page = report(tmp_path, "--title", HOSTILE)
    assert "script" not in {tag for tag, _ in page.elements} | names(drawn(page))
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "<script" not in page.source and "\x00" not in page.source and "\x1b" not in page.source
    assert page.text.count("<script>alert(1)</script>") > 30


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.mark.parametrize("theme", ["dark", "light"])
def test_a_browser_shows_it_without_an_error(folder, tmp_path, theme):
    """A request would break the page's policy, which the browser reports as an error."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH; on Debian: apt-get install chromium")
    command = [browser, "--headless", "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={tmp_path / 'page.png'}"]
    command += ["--window-size=1280,2000", "--force-color-profile=srgb", "--enable-logging=stderr"]
    command += [f"--blink-settings=preferredColorScheme={['dark', 'light'].index(theme)}"]
    done = subprocess.run([*command, (folder / "report.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(tmp_path / "page.png") as image:
        mean = np.asarray(image.convert("RGB")).mean()
    assert mean < 80 if theme == "dark" else mean > 200
