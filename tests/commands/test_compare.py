"""``lora-ext compare``: specs, finished runs that are kept, tables, failures, launchers."""

from __future__ import annotations

import csv
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.command_lines import metrics_of, mistake
from support.processes import Forked

from lora_ext.commands import compare
from lora_ext.commands.compare import planned
from lora_ext.commands.comparison_table import table_rows, tabulate

pytestmark = [pytest.mark.cpu_only("runs are processes of their own"), pytest.mark.full]


def test_specs():
    runs = planned("lora:r=1,2:targets=q,v:name=small", [0, 7], Path("out"), ["--max_steps", "3"])
    assert [(run.label, run.seed) for run in runs] == [(f"small:r={r}", seed) for r in (1, 2) for seed in (0, 7)]
    assert runs[0].options == {"lora_r": "1", "lora_targets": "q,v"}
    assert runs[0].arguments == [
        *("--max_steps", "3", "--method", "lora", "--lora_r", "1", "--lora_targets", "q,v", "--seed", "0"),
        *("--output_dir", "out/small_r=1-seed0", "--resume_from_checkpoint", "true"),
    ]
    (run,) = planned("lora+prefix-embed:prefix-length=3", [0], Path("out"), [])
    assert run.label == "lora+prefix-embed:prefix_length=3" and run.options == {"prefix_length": "3"}


@pytest.fixture(scope="module")
def words(tiny: list[str]) -> list[str]:
    return [*tiny[:6], "--num_train_epochs", "1", "--learning_rate", "2e-2"]


@pytest.fixture
def forked_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes runs in forks, which have the imports that take longer than the training."""

    def run(command: list[str], env: dict[str, str], **streams: object) -> SimpleNamespace:
        return SimpleNamespace(returncode=Forked(*command[1:], **streams, **env).wait())

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.mark.usefixtures("forked_runs")
def test_a_comparison_from_specs_to_tables(command, words, tmp_path):
    label = "lora:r={}:targets=query,value".format
    run = ("compare", label(4), "--seeds", "0,1", "--out", tmp_path, "--jobs", "2", *words)
    status, said, messages = command(*run)
    assert status == 0, messages
    assert "2 runs, 0 of them finished before" in said
    (lora,) = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert lora["seeds"] == [0, 1] and lora["trainable_parameters"] == 2 * 2 * 4 * (32 + 32) + 66
    scores = [metrics_of(tmp_path / f"lora_r=4_targets=query,value-seed{seed}") for seed in (0, 1)]
    assert lora["mean"] == pytest.approx(np.mean([one["test"]["accuracy"] for one in scores]))

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    status, said, _ = command("compare", "lora:r=1,4:targets=query,value", "--seeds", "0", "--out", tmp_path, *words)
    assert status == 0 and "2 runs, 1 of them finished before" in said
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    content = json.loads((tmp_path / "compare.json").read_text())
    rows = {row["label"]: row for row in content["rows"]}
    assert list(rows) == [label(1), label(4)]
    assert content["baseline"] == label(1) and content["metric"] == "accuracy"
    assert rows[label(4)]["interval"][0] <= rows[label(4)]["difference"] <= rows[label(4)]["interval"][1]
    assert rows[label(1)]["interval"] is None
    with (tmp_path / "compare.csv").open() as file:
        table = list(csv.reader(file))
    assert [line[0] for line in table] == ["method", *rows]
    assert f"| {label(1)} | 1 |" in (tmp_path / "compare.md").read_text()
    assert {"scores_against_parameters.png", "ranks.png"} <= {path.name for path in tmp_path.iterdir()}

    line = mistake(command(*run, "--weight_decay", "0.1"))
    assert "holds a run with weight_decay=None, not 0.1; resume it with the same options" in line


@pytest.mark.usefixtures("forked_runs")
def test_a_run_that_fails_is_named_and_the_others_go_on(command, words, tmp_path):
    specs = ["bitfit", "full:learning_rate=1e30"]
    status, said, messages = command("compare", *specs, "--out", tmp_path, *words)
    assert status == 1
    assert "full:learning_rate=1e30, seed 0 failed: lora-ext finetune: error: training diverged" in messages
    assert "| bitfit | 1 |" in said and "Not complete: 1 runs failed." in said


@pytest.mark.usefixtures("forked_runs")
@pytest.mark.parametrize("cluster", ["debug", pytest.param("local", marks=pytest.mark.slow)])
def test_submitit_runs_an_array_of_jobs(command, words, tmp_path, cluster):
    """With "debug" in this process; those of "local" are new processes."""
    specs = ["bitfit", "head-only"] if cluster == "local" else ["bitfit"]
    where = ["--launcher", "submitit", "--launcher_set", f"cluster={cluster}", "--launcher_set", "timeout_min=10"]
    status, said, messages = command("compare", *specs, "--out", tmp_path, *where, *words)
    assert status == 0, messages
    assert f"submitted {len(specs)} job" in said and (tmp_path / "compare.json").exists()


def _run(tmp_path: Path, label: str, seed: int, answers: str) -> tuple[SimpleNamespace, dict]:
    """A finished run whose predictions are right where ``answers`` has a 1."""
    out = tmp_path / f"{label}-{seed}"
    out.mkdir()
    with (out / "predictions.jsonl").open("w") as file:
        for at, one in enumerate(answers):
            line = {"text": f"{at:04}", "label": "yes", "predicted": "yes" if one == "1" else "no"}
            file.write(json.dumps(line) + "\n")
    costs = {"train_seconds": 2.0, "tokens_per_second": 10.0, "peak_memory_bytes": 2**20, "adapter_bytes": 10**6}
    test = {"accuracy": answers.count("1") / len(answers), "macro_f1": 0.5}
    metrics = {"method": label, "options": {}, "trainable_parameters": 7, "test": test, **costs}
    return SimpleNamespace(label=label, seed=seed, out=out, options={}), metrics


def test_intervals_pair_texts_and_seeds(tmp_path):
    done = [_run(tmp_path, "base", seed, "10" * 200) for seed in (0, 1)]
    done += [_run(tmp_path, "same", seed, "10" * 200) for seed in (0, 1)]
    done += [_run(tmp_path, "better", seed, "1110" * 100) for seed in (0, 1)]
    rows = {row["label"]: row for row in table_rows(done, "accuracy", None)}
    assert rows["same"]["interval"] == [0.0, 0.0]  # not so without pairing the texts
    low, high = rows["better"]["interval"]
    # A quarter of 400 texts gain: a standard error of sqrt(0.25 * 0.75 / 400) = 0.0217
    assert rows["better"]["difference"] == pytest.approx(0.25)
    assert [low, high] == pytest.approx([0.25 - 1.96 * 0.0217, 0.25 + 1.96 * 0.0217], abs=0.012)
    _, cells, _ = tabulate(list(rows.values()), "accuracy")
    assert cells[2][:4] == ["better", "2", "75.00", "0.00"] and cells[2][4].startswith("+25.00 (+2")
