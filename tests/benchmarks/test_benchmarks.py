"""Runs the benchmarks from end to end at small sizes, and draws them; their figures here mean nothing."""

import functools
import importlib

import bench_finetune
import bench_grouped
import bench_host
import bench_inject
import bench_merge
import bench_offline_merge
import bench_rows
import plots
import pytest
import run_all
import torch
from harness import contestants, own_process, report
from support import tiny_decoder
from support.optional import datasets, matplotlib, trl  # noqa: F401
from support.tiny_classifier import reviews, save_model, save_reviews

pytestmark = [pytest.mark.cpu_only("runs the scripts on the CPU"), pytest.mark.full]

PEERS = list(contestants.LAYERS)
bench_language_model = importlib.import_module("bench_language_model")  # after the optional packages that it imports


DTYPES = ("--dtype=float32", "--dtype=bfloat16")
LAYER = ("--shapes", "8x16x24")
EXPERTS = ("--experts=4", "--hidden=64", "--intermediate=128", "--tokens=8", "--top=2", "--rank=4")
EXPERTS += ("--implementation=grouped_mm", "--implementation=eager")
ROWS = ("--cases", "3x1@64,4x5@128", "--adapters", "3", "--rank", "4")
GROUPED = ("--shapes", "6x16x24", "--adapters", "4", "--rank", "4", "--only")
TRAINED_ROWS = ["frozen", *bench_grouped.TRAINED]
# Script and options, the number of rows, and the contestants whose ratio each has; None: rows have other figures.
CASES = {
    "layer": ("bench_layer", ("--shapes", "8x16x24,3x40x8", "--no-compile"), 12, PEERS),
    "compiled layer": ("bench_layer", (*LAYER, "--dropout", "0"), 4, [*PEERS, contestants.COMPILED]),
    "dora": ("bench_dora", LAYER, 6, ["lora_ext, LoRA", "lora_ext", "peft accelerated", "peft"]),
    "host": ("bench_host", ("--rank", "4"), len(bench_host.PASSES), PEERS),
    "ranks": ("bench_ranks", (*LAYER, "--ranks", "4"), 4, ["peft", "lora_ext", "library"]),
    "siblings": ("bench_siblings", LAYER, 2, ["siblings", "separate", *PEERS[1:]]),
    "grouped": ("bench_grouped", (*GROUPED, "forward"), 2, ["frozen", *bench_grouped.CONTESTANTS]),
    "grouped, training": ("bench_grouped", (*GROUPED, "training", "--shapes", "40x16x24"), 2, TRAINED_ROWS),
    "rows": (
        *("bench_rows", (*ROWS, "--pool-dtype", "bfloat16"), 4),
        ["frozen", "adapter_names", "pool", "peft", "peft accelerated"],
    ),
    "rows, training": ("bench_rows", (*ROWS, "--training"), 4, ["adapter_names"]),
    "experts": ("bench_experts", (*EXPERTS, *DTYPES), 4, ["frozen", "peft accelerated", "lora_ext"]),
    "decode": ("bench_decode", ("--tokens", "1,3", "--widths", "64x128", "--stack-mib", "1"), 4, PEERS),
    "bottleneck": ("bench_bottleneck", ("--shapes", "8x16x16", "--size", "4"), 2, None),
    "merge": ("bench_merge", (), 2, None),
    "offline merge": ("bench_offline_merge", ("--layers", "2", "--rank", "2"), 2, None),
    "inject": ("bench_inject", ("--layers", "1", "--imports", "2"), 10, None),
}


@pytest.fixture
def small(monkeypatch):
    """Shrinks the sizes that no option sets, and leaves out processes whose imports take seconds."""
    monkeypatch.setattr(bench_host, "CALLS", 2)
    monkeypatch.setattr(bench_rows, "WIDTHS", 128)
    monkeypatch.setattr(bench_merge, "widths", lambda shapes: [(24, 40)])
    for name, size in {"HIDDEN": 64, "INTERMEDIATE": 48, "KEY_VALUE": 8, "VOCABULARY": 40, "SHARD_BYTES": 9000}.items():
        monkeypatch.setattr(bench_offline_merge, name, size)
    monkeypatch.delitem(bench_offline_merge.CONTESTANTS, "PEFT")
    measure_all = own_process.measure_all
    monkeypatch.setattr(own_process, "measure_all", lambda names, rounds, one: measure_all(names, 1, one))
    seconds = functools.cache(bench_inject.seconds_to_import)
    monkeypatch.setattr(bench_inject, "seconds_to_import", lambda module: 9.0 if module == "peft" else seconds(module))


@pytest.mark.parametrize("name", CASES)
def test_what_is_measured(name, run, small):
    script, options, count, peers = CASES[name]
    rows = run(script, *options)["rows"]
    assert len(rows) == count
    for row in rows if peers else ():
        assert list(row["ratio"]) == peers
        assert all(median > 0 for median, *_ in row["ratio"].values())
        assert all(value > 0 for value in row.get("microseconds", {}).values())
    keys = ("dtype", "pass", "dropout", "shape", "case", "implementation", "name", "what", "contestant")
    measured = {tuple(str(row.get(key)) for key in keys) for row in rows}
    assert len(measured) == count  # each row something else


TINY = ("--layers", "1", "--width", "64", "--bert-batch", "2", "--length", "8")
TINY += ("--llama-width", "64", "--llama-batch", "1", "--llama-length", "8", "--llama-rank", "2")


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path_factory):
    """Replaces the demo by a tiny model and few reviews."""
    directory = tmp_path_factory.mktemp("demo")
    data = save_reviews(directory / "reviews.csv", reviews(120))
    path = save_model(directory / "model")
    monkeypatch.setattr(bench_finetune.demo, "classifier", lambda: str(path))
    monkeypatch.setattr(bench_finetune.demo, "reviews", lambda: str(data))


def test_finetune(run, tiny_demo, capsys):
    """tests/ops/test_memory_claims.py compares activations with PEFT's, tests/peft/test_trainers.py losses."""
    options = ("--steps", "4", "--most-steps", "4", "--evaluate-every", "2", "--accuracy", "1.01")
    result = run("bench_finetune", *TINY, *options)
    rows = result["rows"]
    assert [row["contestant"] for row in rows] == 8 * ["head only", "frozen", "lora_ext", "peft", "peft accelerated"]
    assert all(row["peak_bytes"] >= row["activation_bytes"] for row in rows)
    assert all(len(set(losses)) == 4 for losses in result["losses"].values())
    assert "NOT reached in 4 steps" in capsys.readouterr().out
    assert all(entry["steps"] == 4 and not entry["reached"] for entry in result["accuracy"].values())


def test_language_model(run, monkeypatch, tmp_path):
    """The same losses as PEFT's on packed conversations; Gemma's GGUF files of base models have no template."""
    data = tiny_decoder.save_rows(tmp_path / "chats.jsonl", tiny_decoder.chats(tiny_decoder.questions(30)))
    monkeypatch.setattr(bench_language_model.demo, "chats", lambda: str(data))
    path = tiny_decoder.save(tmp_path / "model", tiny_decoder.gemma3(), template=None)
    options = ("--model", str(path), "--max-length", "64", "--steps", "4", "--learning-rate", "5e-3")
    result = run("bench_language_model", *options)
    assert [row["contestant"] for row in result["rows"]] == ["frozen", "lora_ext", "peft", "peft accelerated"]
    ours, theirs = (torch.tensor(result["losses"][name]) for name in ("lora_ext", "peft"))
    assert len(ours) == 4 and len(set(ours.tolist())) == 4
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Wrong(contestants.HandWritten):
    def forward(self, x):
        return super().forward(x) * 1.02  # twice bfloat16's tolerance


def test_a_contestant_that_computes_something_else_is_not_timed(run, monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.LAYERS, "wrong", Wrong)
    monkeypatch.setattr(report.Report, "interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="wrong and lora_ext disagree by .*: not timed"):
        run("bench_layer", *LAYER, "--no-compile")
    assert not list(tmp_path.iterdir())


def test_the_scripts_of_the_whole_run_can_be_imported():
    for script, *_ in run_all.SCRIPTS.values():
        assert importlib.import_module(script.removesuffix(".py")).main


def test_pictures_are_drawn_from_the_results(run, tmp_path):
    run("bench_layer", "--shapes", "8x16x24,3x40x8", "--no-compile")
    (path,) = plots.draw(tmp_path, "cpu")
    picture = path.read_text(encoding="utf-8")
    assert path.suffix == ".svg" and "3 x 40 → 8" in picture and plots.COLOURS["peft"].lower() in picture
    assert "#000000" not in picture  # readable on black
    assert plots.draw_machines(tmp_path) == []
