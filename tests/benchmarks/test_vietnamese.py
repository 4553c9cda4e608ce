"""Tests benchmarks/vietnamese.py: which runs it makes, in which order, and its table; nothing is trained."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import vietnamese
from harness.seed_rows import add_differences
from vietnamese import CANDIDATES, MAIN, METHODS, VARIANTS, Bench, OutOfTime, Task

from lora_ext.tasks.comparison.many_runs import Run, finished

pytestmark = pytest.mark.cpu_only("trains nothing")

BEST = {"full": 1e-4, "lora-qv": 1e-2, "lora-all": 1e-3}  # the validation scores' maxima; 1e-3 for the others


def name_of(label: str) -> str:
    return re.sub(r"-\d\.\de[+-]\d\d-[\d.]+$", "", label)


@pytest.fixture
def tasks(tmp_path: Path) -> list[Task]:
    options = {"data": "/data/train.csv", "test_file": "/data/test.csv", "validation_file": "/data/dev.csv"}
    texts = {"train": 96, "validation": 20, "test": 30}
    vsfc = Task("vsfc", options, (1, 3), tuple(METHODS), tmp_path / "vsfc", "sha", texts)
    return [vsfc, Task("reviews", {}, (2,), tuple(MAIN), tmp_path / "reviews", "sha", texts)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces training: a run writes metrics whose score falls with the distance from the best rate."""
    names: list[str] = []

    def run_all(runs: list[Run], out: Path, what: str) -> dict[Run, dict[str, Any]]:
        (run,) = runs
        name = name_of(run.label)
        names.append(f"{run.label}/{run.settings.seed}")
        best = BEST.get(name.split("-default")[0], 1e-3)
        off = abs(math.log10(run.settings.learning_rate / best))
        scores = {"accuracy": 0.9 - 0.1 * off, "macro_f1": 0.7 - 0.1 * off, "weighted_f1": 0.9}
        classes = [{"label": label, "f1": 0.5, "support": 15} for label in ("negative", "neutral")]
        metrics = {
            "settings": vars(run.settings),
            "data_sha256": "sha",
            "examples": {"test": 30},
            "validation": scores,
            "after": scores | {"classes": classes},
            "trainable_parameters": 10,
            "head_parameters": 2,
            "total_parameters": 100,
            "full_checkpoint_bytes": 1,
            "train_seconds": 3.0,
            "peak_memory_bytes": 2**30,
        }
        directory = run.directory(out)
        directory.mkdir(parents=True)
        (directory / "metrics.json").write_text(json.dumps(metrics))
        wrong = 6 if name == "lora-all" else 3
        answers = [{"line": i, "label": "a", "predicted": "b" if i < wrong else "a"} for i in range(30)]
        (directory / "predictions.jsonl").write_text("\n".join(map(json.dumps, answers)))
        assert finished(run, out) is not None
        return {run: metrics}

    monkeypatch.setattr(vietnamese, "run_all", run_all)
    return names


def test_rates_are_tuned_beyond_the_ends_of_the_grid(tasks: list[Task], made: list[str]):
    bench = Bench(1)
    assert bench.tuned_rate(tasks[0], "full") == 1e-4
    assert made == ["full-3.2e-05-1/0", "full-1.0e-04-1/0", "full-3.2e-04-1/0"]
    assert bench.tuned_rate(tasks[0], "lora-qv") == pytest.approx(1e-2, rel=0.05)
    assert [name for name in made if name.startswith("lora-qv")][3:] == ["lora-qv-1.0e-02-1/0", "lora-qv-3.2e-02-1/0"]


def test_everything_is_made_once_and_the_main_methods_first(tasks: list[Task], made: list[str]):
    assert vietnamese.carry_out(tasks[:1], hours=1)
    assert len(made) == len({*made})
    names = [name_of(text.partition("/")[0]) for text in made]
    others = next(number for number, name in enumerate(names) if name not in {*MAIN, *CANDIDATES})
    # three rates each and two more of lora-qv; both numbers of epochs from three seeds, one of which is known; and
    # four candidates for the defaults
    assert others == 3 * 3 + 2 + 3 * (3 + 3) - 3 + 2 * 3 * 4
    averaged = {name for name in CANDIDATES if "pooler" not in name}
    assert {*names} == {*METHODS, *VARIANTS, *averaged, "lora-qv-default-rate"}
    count = len(made)
    assert vietnamese.carry_out(tasks[:1], hours=0)  # all are known
    assert len(made) == count
    assert not vietnamese.carry_out(tasks, hours=0)  # the other task is not


def test_an_early_end_leaves_a_table(tasks: list[Task], made: list[str], monkeypatch: pytest.MonkeyPatch):
    left = [20]

    def metrics(self: Bench, task: Task, run: Run) -> dict[str, Any]:
        if (known := finished(run, task.out)) is not None:
            return known
        if not left[0]:
            raise OutOfTime
        left[0] -= 1
        return vietnamese.run_all([run], task.out, "")[run]

    with monkeypatch.context() as patch:
        patch.setattr(Bench, "metrics", metrics)
        assert not vietnamese.carry_out(tasks, hours=1)
    assert len(made) == 20
    rows, tuning = vietnamese.results_of(tasks[0])
    assert [(row["name"], row["epochs"], len(row["seeds"])) for row in rows][:3] == [(name, 1, 3) for name in MAIN]
    assert [one["method"] for one in tuning] == [*MAIN]
    assert vietnamese.results_of(tasks[1]) == ([], [])
    assert vietnamese.carry_out(tasks, hours=1)
    assert {*CANDIDATES} <= {row["name"] for row in vietnamese.results_of(tasks[1])[0]}
    complete, _ = vietnamese.results_of(tasks[0])
    names = [row["name"] for row in complete]
    assert {*names} >= {*METHODS, *VARIANTS, "lora-qv-default-rate"}
    assert names.count("bitfit") == 2 and names.count("lora-qv-pooler") == 1
    content = {"tasks": [], "complete": False, "command": ["python"]}
    for task, found in zip(tasks, (complete, vietnamese.results_of(tasks[1])[0]), strict=True):
        content["tasks"].append({"name": task.name, "texts": task.texts, "rows": found, "tuning": tuning})
    minus = {row["name"]: row.get("accuracy_minus_full") for row in complete if row["epochs"] == 1}
    assert minus["full"] is None and {**minus["lora-qv"], "mean": 0, "low": 0, "high": 0} == minus["lora-qv"]
    assert minus["lora-all"]["low"] < -0.1 < minus["lora-all"]["high"]
    assert minus["lora-all"]["mean"] == pytest.approx(-0.1)
    text = vietnamese.markdown(content)
    assert "| -10.0 (-2" in text
    assert "| full (slides) |" in text and "F1 neutral, %" in text and "Not complete" in text
    assert "/data/" not in json.dumps(content["tasks"])  # no path of the machine


def test_processes_share_the_methods(tasks: list[Task], made: list[str]):
    main, others = (replace(tasks[0], methods=names) for names in (("lora-qv", "full"), ("bitfit", "lora-all")))
    assert vietnamese.carry_out([main], hours=1)
    first = {*made}
    assert {name_of(run.partition("/")[0]) for run in first} >= {
        "full",
        "lora-qv",
        "full-pooler",
        "lora-qv-default-rate",
    }
    rows, _ = vietnamese.results_of(tasks[0])  # the other methods have no rate yet
    assert {"full", "full-pooler"} <= {row["name"] for row in rows} and "lora-all" not in {r["name"] for r in rows}
    assert vietnamese.carry_out([others], hours=1)
    assert len(made) == len({*made})
    rows, _ = vietnamese.results_of(tasks[0])
    named = [(row["name"], row["epochs"]) for row in rows]
    assert named[:7] == [(name, epochs) for epochs in (1, 3) for name in MAIN] + [("bitfit", 1)]
    assert named[-1] == ("lora-qv-default-rate", 3) and ("lora-all-pooler", 3) in named


def test_a_committed_table_is_continued(tasks: list[Task], made: list[str], tmp_path: Path):
    task = replace(tasks[0], methods=("full", "lora-all"), of={"model": "small"})
    assert vietnamese.carry_out([task], hours=1)
    rows, tuning = vietnamese.results_of(task)
    row = next(row for row in rows if row["name"] == "lora-all" and row["epochs"] == 3)
    lost = {**row, "seeds": [2], "right": row["right"][2:]}
    for score in ("accuracy", "macro_f1", "weighted_f1", "train_seconds", "peak_memory_bytes"):
        lost[score] = {"values": [0.5], "mean": 0.5, "sd": None}
    lost["f1"] = {label: {"values": [0.5], "mean": 0.5, "sd": None} for label in row["f1"]}
    of = {"model": "small", "data_sha256": "sha"}
    committed = {
        "tasks": [{"name": "vsfc", "of": of, "rows": [lost if r is row else r for r in rows], "tuning": tuning}]
    }
    committed = json.loads(json.dumps(committed))

    elsewhere = replace(task, out=tmp_path / "elsewhere", methods=("full", "lora-all"))
    elsewhere.keep(committed)
    made.clear()
    assert vietnamese.carry_out([elsewhere], hours=1)
    assert made == ["lora-all-1.0e-03-3/0", "lora-all-1.0e-03-3/1"]  # no rate again, and only the seeds that lack
    continued, kept_tuning = vietnamese.results_of(elsewhere)
    assert kept_tuning == tuning and [r["name"] for r in continued] == [r["name"] for r in rows]
    found = next(r for r in continued if r["name"] == "lora-all" and r["epochs"] == 3)
    assert found["seeds"] == [0, 1, 2] and found["accuracy"]["values"] == [*row["accuracy"]["values"][:2], 0.5]
    assert found["right"] == row["right"]  # packed and read again
    assert found["accuracy_minus_full"]["paired"]

    other = replace(elsewhere, of={"model": "large"}, kept={"rows": [], "tuning": []})
    other.keep(committed)
    assert other.kept["rows"] == []  # of another model


def test_without_the_answers_texts_are_not_paired(tasks: list[Task], made: list[str]):
    task = replace(tasks[0], methods=("full", "lora-all"))
    assert vietnamese.carry_out([task], hours=1)
    rows, _ = vietnamese.results_of(task)
    full, row = (next(r for r in rows if r["name"] == name and r["epochs"] == 1) for name in ("full", "lora-all"))
    row["right"][1] = None
    before = dict(row["accuracy_minus_full"])
    add_differences(rows, 30)
    assert row["accuracy_minus_full"] == before  # of the same seeds
    row["accuracy_minus_full"]["of_seeds"] = [[0], [0, 1, 2]]
    add_differences(rows, 30)
    found = row["accuracy_minus_full"]
    share, of_full = row["accuracy"]["mean"], full["accuracy"]["mean"]
    assert not found["paired"] and found["mean"] == share - of_full
    half = 1.96 * ((share * (1 - share) + of_full * (1 - of_full)) / 30) ** 0.5  # all seeds have one accuracy
    assert found["high"] - found["low"] == pytest.approx(2 * half)
