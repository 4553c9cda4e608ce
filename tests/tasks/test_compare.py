"""compare and sweep on a tiny model: tables match the runs, interruptions change nothing, mistakes are reported."""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_classifier
from support.optional import matplotlib  # noqa: F401
from support.processes import Forked
from transformers import BertModel

from lora_ext._common import progress
from lora_ext.cli import main
from lora_ext.cli.training import options_of
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison import compare, many_runs, pools
from lora_ext.tasks.comparison.launch import Launch
from lora_ext.tasks.comparison.many_runs import Run
from lora_ext.tasks.comparison.method_spec import MethodSpec
from lora_ext.tasks.comparison.pools import LocalPool
from lora_ext.tasks.finetune.run import finetune
from lora_ext.tasks.finetune.settings import Settings

pytestmark = pytest.mark.full

DRAWS = True
METHODS = ["full:learning-rate=5e-3", "lora:r=2", "lora+adapter-p"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("tiny")
    options = (part for name, value in tiny_classifier.save(directory, 120).items() for part in (f"--{name}", value))
    return [*options, "--max-length", "32", "--epochs", "1", "--test-split", "0.3", "--batch-size", "8"]


@pytest.fixture(scope="module")
def compared(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    assert main(["compare", *options, "--methods", *METHODS, "--seeds", "0,1", "--jobs", "2", "--out", str(out)]) == 0
    return out


@contextmanager
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def runs_of(out: Path) -> dict[Path, dict[str, Any]]:
    return {path.parent.relative_to(out): json.loads(path.read_text()) for path in sorted(out.rglob("metrics.json"))}


def test_the_table_matches_the_metrics_of_the_runs(compared: Path):
    result, runs = json.loads((compared / "compare.json").read_text()), runs_of(compared)
    assert [row["label"] for row in result["methods"]] == METHODS
    assert len(runs) == 6
    for row in result["methods"]:
        of_method = [run for run in runs.values() if run["settings"] | {"seed": 0} == row["settings"]]
        assert row["accuracy"]["values"] == [run["after"]["accuracy"] for run in of_method]
        assert row["accuracy"]["mean"] == pytest.approx(sum(row["accuracy"]["values"]) / 2)
        assert row["trained_parameters"] == of_method[0]["trainable_parameters"]
        assert row["head_parameters"] == 2 * 32 + 2
        assert row["step_ms"]["q1"] <= row["step_ms"]["median"] <= row["step_ms"]["q3"]
        assert ("merged_forward_ms" in row) == (row["method"] == "lora")
    full, lora, both = result["methods"]
    assert full["trained_parameters"] == full["total_parameters"]
    assert lora["settings"]["r"] == 2 and both["settings"]["r"] == 8
    assert full["settings"]["learning_rate"] == 5e-3 and lora["settings"]["learning_rate"] == 2e-4
    assert lora["checkpoint_bytes"] < both["checkpoint_bytes"] < full["checkpoint_bytes"]
    text = (compared / "compare.md").read_text()
    assert all(f"| {method} |" in text for method in METHODS) and "over seeds 0, 1, on 35 test texts" in text
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not list(compared.rglob("checkpoints"))
    assert all(row["runs_at_once"] == 2 for row in result["methods"]) and result["left_out"] == []
    assert "\\* | " in text and "of runs that shared the machine, up to 2 at once" in text
    assert all("latency" not in run for run in runs.values())  # compare measures latency itself


def test_a_run_equals_finetune(compared: Path, tmp_path: Path):
    directory, metrics = next((path, run) for path, run in runs_of(compared).items() if "lora-r=2" in str(path))
    with one_thread():
        alone = finetune(Settings(**metrics["settings"]), tmp_path / "alone")
    assert alone["after"] == metrics["after"]
    file = Path("adapter", "adapter_model.safetensors")
    assert (compared / directory / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


def test_resuming_a_finished_comparison_adds_methods_and_repeats_nothing(options, compared: Path):
    before = {path: path.stat().st_mtime_ns for path in compared.rglob("metrics.json")}
    first = json.loads((compared / "compare.json").read_text())
    assert main(["compare", "--resume", "--out", str(compared), "--methods", "head-only"]) == 0
    result = json.loads((compared / "compare.json").read_text())
    assert result["methods"][3]["label"] == "head-only"
    assert result["command"][:7] == ["lora-ext", "compare", "--methods", *METHODS, "head-only"]
    assert result["command"][7:9] == ["--seeds", "0,1"] and result["command"][-2:] == ["--out", str(compared)]
    assert [row["accuracy"] for row in result["methods"][:3]] == [row["accuracy"] for row in first["methods"]]
    after = {path: path.stat().st_mtime_ns for path in compared.rglob("metrics.json")}
    assert {path: after[path] for path in before} == before and len(after) == len(before) + 2
    assert main(["compare", "--resume", "--out", str(compared), "--without", "head-only"]) == 0
    result = json.loads((compared / "compare.json").read_text())
    assert [row["label"] for row in result["methods"]] == METHODS


def test_resuming_with_other_texts_repeats_the_runs_and_costs(tmp_path: Path):
    directory = tmp_path / "files"
    rows = tiny_classifier.reviews(60)
    options = ["--model", str(tiny_classifier.save_model(directory)), "--max-length", "32", "--epochs", "1"]
    data, out = tiny_classifier.save_reviews(directory / "reviews.csv", rows), tmp_path / "out"
    arguments = ["compare", *options, "--data", str(data), "--methods", "head-only", "--seeds", "0"]
    assert main([*arguments, "--out", str(out)]) == 0
    first = runs_of(out)
    tiny_classifier.save_reviews(data, rows[:30])
    assert main(["compare", "--resume", "--out", str(out)]) == 0
    again = runs_of(out)
    both = [*first.values(), *again.values()]
    assert [run["examples"]["train"] for run in both] == [48, 24]
    fingerprints = [run["data_sha256"] for run in both]
    assert json.loads((out / "costs.json").read_text())["data_sha256"] == fingerprints[1] != fingerprints[0]


def test_interrupted_and_resumed_ends_like_uninterrupted(options: list[str], tmp_path: Path):
    longer = [*options, "--epochs", "20", "--methods", "lora", "bitfit:epochs=1", "--seeds", "0"]
    out = tmp_path / "interrupted"
    process = Forked(
        *("-m", "lora_ext", "compare", *longer, "--out", out),
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        OMP_NUM_THREADS=str(torch.get_num_threads()),
    )
    log = out / "runs" / "lora" / "seed-0.log"
    while not log.is_file() or "finetune: " not in log.read_text():  # until training has begun
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    output = process.communicate()[0]
    assert process.returncode == 130, output
    assert f"to continue: lora-ext compare --resume --out {out}" in output
    assert not runs_of(out) and list(out.glob("runs/lora/seed-0/checkpoints/*"))

    assert main(["compare", "--resume", "--out", str(out)]) == 0
    assert main(["compare", *longer, "--out", str(tmp_path / "whole")]) == 0
    resumed, whole = runs_of(out), runs_of(tmp_path / "whole")
    assert {path: run["after"] for path, run in resumed.items()} == {path: run["after"] for path, run in whole.items()}
    assert len(whole) == 2


def test_methods_that_do_not_suit_the_checkpoint_are_left_out(options: list[str], tmp_path: Path, capsys):
    model = tmp_path / "model"
    tiny_classifier.save_tokenizer(model)
    BertModel(tiny_classifier.config(num_hidden_layers=1)).save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    arguments = [*options, "--model", str(model), "--seeds", "0", "--out", str(tmp_path / "out")]
    methods = ["full:learning-rate=5e-3", "bitfit", "lora:modules-to-save=encoder.layer.1"]
    assert main(["compare", *arguments, "--methods", *methods]) == 3
    assert "bitfit is left out: --method bitfit: " in (said := capsys.readouterr().out)
    result, text = (tmp_path / "out" / name for name in ("compare.json", "compare.md"))
    result = json.loads(result.read_text())
    assert [row["label"] for row in result["methods"]] == [
        "full:learning-rate=5e-3",
        "lora:modules-to-save=encoder.layer.1",
    ]
    ((label, reason),) = [method.values() for method in result["left_out"]]
    assert label == "bitfit" and "has no values for bert.encoder.layer.1." in reason
    assert "Left out, because they do not suit the checkpoint:\n\n- `bitfit`: " in text.read_text() and reason in said
    assert "bitfit" in result["command"]
    assert main(["compare", "--resume", "--out", str(tmp_path / "out")]) == 3
    assert main(["compare", *arguments[:-1], str(tmp_path / "none"), "--methods", "bitfit", "head-only"]) == 2
    assert "--methods: none suits the model: bitfit: " in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("compare-settings.json", "{"),
        ("compare-settings.json", "[1]"),
        ("compare-settings.json", '{"methods": "lora", "seeds": [0], "options": {}}'),
        ("compare-settings.json", '{"methods": ["lora"], "seeds": ["0"], "options": {}}'),
        ("compare-settings.json", '{"methods": ["lora"], "seeds": [0], "options": {"r": "8"}}'),
        ("compare-settings.json", '{"methods": ["lora"], "seeds": [0], "options": {"run": 1}}'),
        ("compare-settings.json", '{"methods": ["lora"], "seeds": [0], "options": {}, "run": "x"}'),
        ("sweep-settings.json", '{"ranks": [1.5], "targets": ["q"], "seeds": [0], "options": {}}'),
        ("settings.json", '{"r": null}'),
        ("settings.json", '{"method": 3}'),
        ("settings.json", '{"dora": true}'),
        ("settings.json", '{"epochs": true}'),
        ("settings.json", '{"model": "\\ud800"}'),
        ("settings.json", "[" * 100_000),
    ],
)
def test_damaged_settings_are_named(tmp_path: Path, capsys, name: str, content: str):
    (tmp_path / name).write_text(content)
    command = {"compare-settings.json": "compare", "sweep-settings.json": "sweep", "settings.json": "finetune"}[name]
    assert main([command, "--resume", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ext: error: --resume: ") and name in error and len(error.splitlines()) == 1


def test_sweep_tabulates_ranks_and_weights(options: list[str], tmp_path: Path):
    arguments = ["--ranks", "1,3", "--targets", "q;q,v,o", "--seeds", "0", "--budget", "600", "--out", str(tmp_path)]
    assert main(["sweep", *options, *arguments]) == 0
    result, runs = json.loads((tmp_path / "sweep.json").read_text()), runs_of(tmp_path)
    # rank 1 on q in two layers: 2 * (32 + 32) parameters; a budget of 600 allows rank 4 on q, and rank 1 on q,v,o
    cells = {(cell["r"], cell["target_modules"]): cell for cell in result["cells"]}
    assert set(cells) == {(1, "q"), (3, "q"), (1, "q,v,o"), (3, "q,v,o"), (4, "q")}
    assert {key: cell["parameters"] for key, cell in cells.items()} == {
        (r, targets): r * len(targets.split(",")) * 2 * 64 for r, targets in cells
    }
    assert [cell["parameters"] for cell in result["within_budget"]] == [512, 384]
    assert result["best_rank"] == {"q": None, "q,v,o": None}  # one seed has no spread
    for metrics in runs.values():
        cell = cells[metrics["settings"]["r"], metrics["settings"]["target_modules"]]
        assert metrics["trainable_parameters"] == cell["parameters"] + 66  # the head
        assert cell["accuracy"]["values"] == [metrics["after"]["accuracy"]]
    document = (tmp_path / "sweep.md").read_text()
    assert "| `q,v,o` | 384 |" in document
    assert "With one seed the spread is unknown, so none is marked." in document and "Bold" not in document
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


NAMED = ["lora:r=2:target-modules=q,v:name=lora-qv", "lora:name=lora.q+2:r=1:target-modules=q", "bitfit"]


def test_names_stand_for_methods_everywhere(options: list[str], tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(progress, "_BETWEEN", 0.0)  # a line for every step, however fast the runs are
    monkeypatch.setattr(progress, "_PARTS", 1e9)
    monkeypatch.setattr(many_runs, "progress", functools.partial(many_runs.progress, first=0.0))
    out = tmp_path / "out"
    assert main(["compare", *options, "--methods", *NAMED, "--seeds", "0", "--out", str(out)]) == 0
    said = capsys.readouterr()
    labels = ["lora-qv", "lora.q+2", "bitfit"]
    result = json.loads((out / "compare.json").read_text())
    assert [(row["label"], row["spec"]) for row in result["methods"]] == list(zip(labels, NAMED, strict=True))
    assert [row["settings"]["r"] for row in result["methods"][:2]] == [2, 1]
    assert result["command"][2:6] == ["--methods", *NAMED]
    assert {path.name for path in (out / "runs").iterdir()} == {*labels}
    assert json.loads((out / "costs.json").read_text())["costs"].keys() == {*labels, "base"}
    text = (out / "compare.md").read_text()
    assert all(f"| {label} |" in text for label in ("lora-qv", "lora.q+2")) and f"- `lora-qv`: `{NAMED[0]}`\n" in text
    assert all(f"{label}, seed 0" in said.err for label in labels)

    # A resumed comparison keeps its names, repeats nothing, and refuses another name for the same runs.
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")}
    again = ["compare", "--resume", "--out", str(out)]
    assert main([*again, "--methods", NAMED[0].replace("lora-qv", "query-value")]) == 2
    error = capsys.readouterr().err
    assert "are the same runs under two names" in error and "name=query-value" in error and NAMED[0] in error
    assert main([*again, "--methods", "lora:r=8:name=lora-qv"]) == 2
    assert "have one name, 'lora-qv'" in capsys.readouterr().err
    assert main([*again, "--without", "lora-qv", "bitfit"]) == 0
    assert [row["label"] for row in json.loads((out / "compare.json").read_text())["methods"]] == ["lora.q+2"]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.json")} == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["compare", "--methods", "lora:name=a/b"], "'lora:name=a/b': name is 'a/b', want at most 40 letters"),
        (["compare", "--methods", "lora:r=1:name=a", "lora:r=2:name=a"], "have one name, 'a'"),
        (["compare", "--methods", "lora", "loro"], "--method is 'loro', want one of full, bitfit"),
        (["compare", "--methods", "lora:r=0"], "--methods lora:r=0: LoraConfig: r is 0"),
        (["compare", "--methods", "adapter-drop:drop-layers=2"], "drop_layers is 2, but the model has 2 layers"),
        (["sweep", "--targets", "q;qeury"], "--targets qeury: .*close matches: 'query'"),
        (["compare", "--methods", "lora", "lora:test-split=0.5"], "test_split is the same for all; give --test-split"),
        (["compare", "--methods", "adapter-h:r=64"], "r goes with lora, not with adapter-h"),
        (["compare", "--methods", "adapter-h", "full", "--r", "2"], "--r goes with lora, and none of these is in"),
        (["sweep", "--bottleneck-size", "2"], "unrecognized arguments: --bottleneck-size 2"),
        (
            ["compare", "--methods", "lora", "prefix-embed:prefix-length=26"],
            "--methods prefix-embed.*takes 26",
        ),
        (["compare", "--methods", "lora", "--without", "bitfit"], "--without bitfit: there are lora"),
        (["sweep", "--ranks", "2,0"], "--ranks: LoraConfig: r is 0"),
        (["sweep", "--budget", "0"], "--budget is 0, but all-linear has .* parameters at rank 1; want at least that"),
        (["sweep", "--seeds", "a"], "'a', want integers such as 0,1,2"),
        (["sweep", "--targets", ";"], "want sets of weights such as 'q;q,v'"),
    ],
)
def test_mistakes_are_reported_before_the_first_run(options, tmp_path: Path, capsys, command, message):
    arguments = [command[0], *options, *command[1:], "--out", str(tmp_path / "out")]
    try:
        code = main(arguments)
    except SystemExit as error:  # raised by argparse
        code = error.code
    assert code == 2
    assert not (tmp_path / "out").exists()
    assert re.search(message, capsys.readouterr().err, re.S)


def test_a_directory_of_something_else_is_refused(options, compared: Path, tmp_path: Path, capsys):
    assert main(["compare", *options, "--out", str(compared)]) == 2
    assert "holds a run already; --resume continues it" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["sweep", *options, "--overwrite", "--out", str(tmp_path)]) == 2
    assert "holds files that do not belong to a sweep" in capsys.readouterr().err
    assert main(["sweep", "--resume", "--out", str(tmp_path)]) == 2
    assert "holds no run to continue" in capsys.readouterr().err


def test_a_local_model_is_found_from_another_directory(options: list[str], tmp_path: Path, monkeypatch):
    model = Path(options[1])
    monkeypatch.chdir(model.parent)
    arguments = argparse.Namespace(**asdict(Settings(model=model.name, data="reviews.csv")))
    assert options_of(arguments)["model"] == str(model)
    arguments.model = "vinai/phobert-base"
    assert options_of(arguments)["model"] == "vinai/phobert-base"


def test_costs_are_measured_again_on_another_machine_or_with_other_texts(tmp_path: Path, monkeypatch):
    calls, pool, there = [], LocalPool(), {"processor": "there"}
    monkeypatch.setattr(pools, "in_process", lambda *args, **how: (calls.append(args) or {"base": len(calls)}, there))
    costs = [compare._costs({"lora": Settings()}, "texts", tmp_path, pool) for _ in range(2)]
    assert costs == [({"base": 1}, there)] * 2 and len(calls) == 1
    assert compare._costs({"lora": Settings()}, "others", tmp_path, pool)[0] == {"base": 2}
    monkeypatch.setattr(compare.provenance, "machine", lambda: {"processor": "another"})
    assert compare._costs({"lora": Settings()}, "others", tmp_path, pool)[0] == {"base": 3}


@pytest.mark.parametrize("damage", ["[]", '{"settings": 3}', "{", "[" * 100_000, None])
def test_a_run_whose_metrics_are_damaged_is_not_finished(compared: Path, tmp_path: Path, damage: str | None):
    path, metrics = next(iter(runs_of(compared).items()))
    label = next(label for label in METHODS if label.replace(":", "-") in str(path))
    run = Run(label, Settings(**metrics["settings"]), metrics["data_sha256"])
    directory = run.directory(tmp_path)
    directory.mkdir(parents=True)
    (directory / "metrics.json").write_text(json.dumps(metrics))
    assert many_runs.finished(run, tmp_path) == metrics
    text = json.dumps({**metrics, "after": {}}) if damage is None else damage
    (directory / "metrics.json").write_text(text)
    assert many_runs.finished(run, tmp_path) is None


def test_a_failing_run_is_named_and_the_others_go_on(options: list[str], compared: Path, tmp_path: Path, capsys):
    settings = json.loads((compared / "compare-settings.json").read_text())["options"]
    texts = next(iter(runs_of(compared).values()))["data_sha256"]
    specs = {"bad": "lora:r=0", "good": "head-only", "worse": "lora:r=-1"}
    runs = [Run(label, MethodSpec.parse(spec).settings(settings, 0), texts) for label, spec in specs.items()]
    with pytest.raises(TaskError, match="2 of 3 runs failed; --resume repeats them: bad, seed 0: .*; worse, seed 0: "):
        many_runs.run_all(runs, tmp_path, "compare", Launch(jobs=2))
    assert "bad, seed 0 failed: --method lora: LoraConfig: r is 0" in capsys.readouterr().err
    assert [path.parent.name for path in runs_of(tmp_path)] == ["good"]
