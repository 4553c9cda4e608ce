"""``lora-ext report``: figures and sentences of the page, and escaping of hostile input."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from support.optional import matplotlib  # noqa: F401
from support.processes import run_python
from support.report_results import ANALYSIS, COMPARE, METHODS, SWEEP, change_json

from lora_ext.cli import main
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.spread import percent, summary
from lora_ext.tasks.report import write_report

pytestmark = pytest.mark.cpu_only("is about files")


@pytest.fixture
def copied(results: Path, tmp_path: Path) -> Path:
    """A copy of the results that the test may change."""
    return Path(shutil.copytree(results, tmp_path / "results"))


class Parsed(HTMLParser):
    """A document whose elements are closed in the right order.

    Attributes:
        elements: ``(tag, attributes)`` in order.
        texts: the elements' texts, by tag.
        rows: the cells' texts, for each row of all tables.
        values: the numbers that cells are sorted by.
        best: the texts of marked cells.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[list[str]] = []
        self.values: set[float] = set()
        self.best: list[str] = []
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            if value := dict(attrs).get("data-value"):
                self.values.add(float(value))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts.setdefault(self._open[-1], []).append(data)
        if {"td", "th"} & {*self._open}:
            self.rows[-1][-1] += data
        if self._open[-1:] == ["strong"]:
            self.best.append(data)

    @property
    def text(self) -> str:
        return "\n".join(text for tag, texts in self.texts.items() if tag not in ("style", "script") for text in texts)


def numbers(value: Any) -> Iterator[float]:
    """Yields all numbers in a part of a file."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


# --- the document -----------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_page_is_complete_and_loads_nothing(page: Path):
    parsed = Parsed(page)
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len({*ids}) == 5
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "style", (tag, name)
            assert "://" not in value
            if name in ("src", "href"):
                assert re.match(r"#part-\d$|data:image/png;base64,", value), (tag, value[:40])
                assert not value.startswith("#") or value[1:] in ids
    assert {tag for tag, _ in parsed.elements}.isdisjoint({"link", "iframe", "object", "embed", "form", "base"})
    (style,), (script,) = parsed.texts["style"], parsed.texts["script"]
    assert "url(" not in style and "@import" not in style
    (policy,) = [
        meta["content"] for tag, meta in parsed.elements if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    digests = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", style), ("script", script))
    }
    wanted = [
        "default-src 'none'",
        "img-src data:",
        *(f"{kind}-src 'sha256-{digest}'" for kind, digest in digests.items()),
    ]
    assert policy.split("; ")[:4] == wanted
    assert page.stat().st_size < 3_000_000


def test_equal_results_make_equal_pages(page: Path, copied: Path, tmp_path: Path):
    assert write_report(copied, tmp_path / "again.html").read_bytes() == page.read_bytes()


def test_every_figure_of_compare(results: Path, page: Path):
    content, parsed = json.loads((results / COMPARE).read_text()), Parsed(page)
    assert [row["label"] for row in content["methods"]] == METHODS
    keys = ("accuracy", "macro_f1", "validation_accuracy", "train_seconds", "peak_memory_bytes")
    for row in content["methods"]:
        for key in keys:
            assert parsed.values >= {*row[key]["values"]}, key
        number = row["trained_parameters"] - row["head_parameters"]
        times = [*numbers([row["step_ms"], row["forward_ms"], row.get("merged_forward_ms")])]
        assert parsed.values >= {number, row["checkpoint_bytes"], *times}
        shown = [row["label"], f"{number:,}", f"{row['trained_parameters'] / row['total_parameters']:.2%}"]
        shown += [percent(row["accuracy"]), percent(row["macro_f1"]), f"{row['step_ms']['median']:.1f}"]
        assert shown in [cells[:6] for cells in parsed.rows]
    assert parsed.values >= {*numbers(content["base_forward_ms"])}
    assert "the head" in parsed.text and "Figure 2 of the LoRA paper" in parsed.text


def test_every_figure_of_sweep(results: Path, page: Path):
    content, parsed = json.loads((results / SWEEP).read_text()), Parsed(page)
    for setting in content["cells"]:
        assert parsed.values >= {
            setting["r"],
            setting["parameters"],
            *setting["accuracy"]["values"],
            *setting["macro_f1"]["values"],
        }
        assert percent(setting["accuracy"]) in [text for cells in parsed.rows for text in cells]
    weights = [cells for cells in parsed.rows if cells[0] == "q,v" and len(cells) == 5]
    (cell,) = [setting for setting in content["within_budget"] if setting["target_modules"] == "q,v"]
    expected = ["q,v", f"{cell['r']}", f"{cell['parameters']:,}", percent(cell["accuracy"]), percent(cell["macro_f1"])]
    assert weights == [expected]


def test_every_figure_of_analyze(results: Path, page: Path):
    content, parsed = json.loads((results / ANALYSIS).read_text()), Parsed(page)
    assert len(content["layers"]) == 13  # two layers of six, and the pooler
    for layer in content["layers"]:
        for adapter in layer["adapters"]:
            wanted = {key: value for key, value in adapter.items() if key not in ("projection", "singular_values")}
            last = [adapter["projection"][key][-1] for key in ("delta", "weight", "random", "amplification")]
            assert parsed.values >= {*last, *numbers(wanted)} - {adapter["scaling"], adapter["numerical_rank"]}
    for adapter in content["summary"]["adapters"]:
        assert parsed.values >= {adapter["norm"], adapter["relative_change"], *numbers(adapter["kinds"])}
        assert f"{adapter['most_changed'][0]['name']} most" in parsed.text
    (pair,) = content["summary"]["similarity"]
    for side in "AB":
        for i, row in enumerate(pair[side]["phi"], 1):
            assert all(f"({i}, {j}): {value:.3g}" in parsed.texts["title"] for j, value in enumerate(row, 1))
    keys = [layer for layer in content["layers"] if "attention.self.key" in layer["name"]]
    spectra = [layer["adapters"][1]["singular_values"] for layer in keys]
    second = sum(values[1] / values[0] for values in spectra) / 2  # for two layers the mean is the median
    assert any(
        re.match(rf".*attention\.self\.key, direction 2: {second:.3g}, ", says) for says in parsed.texts["title"]
    )


def test_every_figure_of_finetune(results: Path, page: Path):
    parsed = Parsed(page)
    metrics = json.loads((results / "single" / "metrics.json").read_text())
    assert [
        "training",
        f"{metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s",
    ] in parsed.rows
    curves = [attributes["src"] for tag, attributes in parsed.elements if attributes.get("class") == "picture"]
    single = base64.b64encode((results / "single" / "loss_curve.png").read_bytes()).decode()
    assert f"data:image/png;base64,{single}" in curves and len(curves) == 3 + 4 + 1  # groups' first runs, and itself


# --- sentences on the page --------------------------------------------------------------------------------------------


@pytest.mark.full
def test_winners_are_marked_beyond_the_spread_only(copied: Path):
    def give(accuracies: dict[str, list[float]]) -> Parsed:
        def change(content: dict[str, Any]) -> None:
            for row in content["methods"]:
                row["accuracy"] = summary(accuracies[row["label"]])

        change_json(copied / COMPARE, change)
        return Parsed(write_report(copied))

    shutil.rmtree(copied / "sweep")
    level = give({"bitfit": [0.80, 0.84], "lora:r=2": [0.82, 0.83], "lora:r=3": [0.60, 0.61]})
    assert level.best == []
    assert "No method is ahead of every other" in level.text
    assert "Of the 2 methods within the spread of the best, bitfit trains the fewest" in level.text
    ahead = give({"bitfit": [0.80, 0.81], "lora:r=2": [0.90, 0.91], "lora:r=3": [0.60, 0.61]})
    assert ahead.best == ["90.5 ± 0.7"]
    assert "lora:r=2 is ahead of every other method by more than the spread" in ahead.text
    change_json(copied / COMPARE, lambda content: content.update(seeds=[0]))
    once = give({"bitfit": [0.80], "lora:r=2": [0.90], "lora:r=3": [0.60]})
    assert once.best == [] and "from one seed" in once.text and "is ahead" not in once.text


def test_ranks_are_marked_beyond_the_spread_only(copied: Path):
    def change(content: dict[str, Any]) -> None:
        for setting in content["cells"]:
            high = (setting["r"], setting["target_modules"]) == (2, "q")
            setting["accuracy"] = summary([0.9, 0.91] if high else [0.7, 0.71])
        content["within_budget"] = [setting for setting in content["cells"] if setting["r"] == 1]

    change_json(copied / SWEEP, change)
    shutil.rmtree(copied / "compare")
    parsed = Parsed(write_report(copied))
    assert parsed.best == ["90.5 ± 0.7"]
    assert "q: rank 2 is ahead of all others." in parsed.text
    assert "q,v: no rank is ahead of all others; the lowest" in parsed.text
    assert "None is ahead of all others: the seeds" in parsed.text


def test_parts_that_are_not_there_are_left_out(copied: Path, tmp_path: Path):
    page = Parsed(write_report(copied / "sweep", tmp_path / "page.html"))
    assert page.texts["h2"] == ["LoRA by rank and by weights"]
    shutil.rmtree(copied / "sweep")
    (copied / COMPARE).unlink()  # as in an unfinished comparison: only the runs exist
    page = Parsed(write_report(copied))
    assert page.texts["h2"].count("A single run") == 1 + 6
    (copied / "single" / "loss_curve.png").write_text("no picture")
    assert not [1 for _, attributes in Parsed(write_report(copied / "single")).elements if "src" in attributes]


def test_results_without_some_figures(copied: Path):
    def bare(content: dict[str, Any]) -> None:
        content.update(base=None, notes=["What needs the base's weights is left out."])
        for layer in content["layers"]:
            layer["weight_norm"] = None
            for adapter in layer["adapters"]:
                adapter.update(projection=None, relative_change=None)
        for adapter in content["summary"]["adapters"]:
            for kind in adapter["kinds"].values():
                kind.update(dict.fromkeys(("relative_change", "delta", "weight", "random", "amplification")))
        for side in "AB":
            content["summary"]["similarity"][0][side] = None

    change_json(copied / ANALYSIS, bare)
    change_json(copied / COMPARE, lambda content: [row.update(validation_accuracy=None) for row in content["methods"]])
    change_json(
        copied / "single" / "metrics.json", lambda content: content["merged"].update(max_logit_difference=math.nan)
    )
    parsed = Parsed(write_report(copied))
    assert "What needs the base's weights is left out." in parsed.text
    assert "no layer has directions to compare" in parsed.text and "amplification is" in parsed.text
    assert "median amplification" not in parsed.text and "fit" not in " ".join(parsed.texts["p"]).split()
    assert "logits differ by at most nan" in parsed.text


# --- files from elsewhere ---------------------------------------------------------------------------------------------

HOSTILE = "</td></title><script>alert(1)</script><img src=x onerror=alert(2)>\" onload='alert(3)' &amp; \x00"


def test_content_of_files_stays_text(copied: Path):
    def change(content: dict[str, Any]) -> None:
        content["methods"][1].update(label=HOSTILE, method=HOSTILE)
        content.update(command=[HOSTILE])
        content["machine"]["processor"] = HOSTILE
        content["options"]["model"] = HOSTILE

    change_json(copied / COMPARE, change)
    change_json(copied / ANALYSIS, lambda content: content["adapters"][0].update(path=HOSTILE))
    parsed = Parsed(write_report(copied, title=f"{HOSTILE}\ud800"))
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert not [name for _, attributes in parsed.elements for name in attributes if name.startswith("on")]
    assert all(attributes["src"].startswith("data:") for tag, attributes in parsed.elements if tag == "img")
    shown = HOSTILE.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    assert parsed.texts["h1"] == [shown + "\N{REPLACEMENT CHARACTER}"]
    assert [cells for cells in parsed.rows if cells[:1] == [shown]] and any(shown in cells for cells in parsed.rows)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("compare/compare.json", '{"methods": [', r"compare\.json is not JSON: Expecting value"),
        ("sweep/sweep.json", "[]", r"sweep\.json holds a list, want an object; run lora-ext sweep again, or move"),
        ("single/metrics.json", '{"settings": "\\ud800"}', r"metrics\.json has a string that is not Unicode"),
        ("single/metrics.json", "[" * 100_000, r"metrics\.json is nested too deeply"),
        ("single/metrics.json", '"\xff', r"metrics\.json is not JSON"),
    ],
)
def test_a_file_that_is_no_result_is_named(copied: Path, name: str, text: str, message: str):
    (copied / name).write_text(text, encoding="latin-1")
    with pytest.raises(TaskError, match=message):
        write_report(copied)
    assert not (copied / "report.html").exists()


def test_an_existing_file_is_not_replaced(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "empty").mkdir()
    assert main(["report", str(tmp_path / "empty")]) == 2
    assert "holds no result of lora-ext: finetune writes metrics.json" in capsys.readouterr().err
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for out, message in (
        (mine, "exists and is not a page of lora-ext report; name another file"),
        (tmp_path, "is a directory; name the file in it"),
        (tmp_path / "nowhere" / "page.html", "nowhere is not a directory"),
    ):
        assert main(["report", str(copied), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert mine.read_text() == "mine"
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "none is not a directory" in capsys.readouterr().err
    (copied / "report.html").write_text('<meta name="generator" content="lora-ext report">older')
    assert main(["report", str(copied), "--title", "Week 3 & 4"]) == 0
    assert Parsed(copied / "report.html").texts["h1"] == ["Week 3 & 4"]


@pytest.mark.full
def test_report_needs_no_package_except_matplotlib_and_jinja2(copied: Path, page: Path, tmp_path: Path):
    """Users copy results to machines that lack the packages that produced them."""

    def report_without(*names: str) -> subprocess.CompletedProcess:
        code = (
            f"import sys; sys.modules.update(dict.fromkeys({names})); from lora_ext.cli import main; sys.exit(main())"
        )
        return run_python("-c", code, "report", copied, "--out", tmp_path / "page.html")

    missing = report_without("matplotlib", "jinja2")
    assert missing.returncode == 2 and not (tmp_path / "page.html").exists()
    assert "report needs jinja2, matplotlib: pip install" in missing.stderr and "[report]" in missing.stderr
    assert report_without("transformers", "tqdm", "peft", "matplotlib.pyplot").returncode == 0
    assert (tmp_path / "page.html").read_bytes() == page.read_bytes()


@pytest.mark.full
def test_a_large_analysis_makes_no_large_page(copied: Path):
    def enlarge(content: dict[str, Any]) -> None:
        phi = [[min(i, j) / 64 for j in range(64)] for i in range(64)]
        (pair,) = content["summary"]["similarity"]
        for side in "AB":
            pair[side].update(phi=phi, random_mean=phi)
        content["summary"]["similarity"] = [pair] * 40
        first = content["layers"]
        content["layers"] = [{**layer, "name": f"block.{i}.{layer['name']}"} for i in range(100) for layer in first]
        for adapter in content["summary"]["adapters"]:
            adapter["most_changed"] = []

    change_json(copied / ANALYSIS, enlarge)
    page = write_report(copied)
    assert page.stat().st_size < 3_000_000
    text = Parsed(page).text
    assert "16 more pairs: see analysis.json." in text and "600 more rows are in analysis.json" in text
