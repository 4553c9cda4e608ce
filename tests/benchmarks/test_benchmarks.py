"""Runs the benchmarks from end to end at small sizes; their figures here mean nothing."""

import functools
import importlib

import bench_finetune
import bench_grouped
import bench_host
import bench_inject
import bench_merge
import bench_offline_merge
import bench_rows
import pytest
import torch
from harness import contestants, own_process
from support import tiny_decoder
from support.optional import datasets, matplotlib, trl  # noqa: F401
from support.tiny_classifier import reviews, save_model, save_reviews

from lora_ext.commands.options import CommandError

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
# Script and options, the number of rows, and the contestants whose ratio each has.
CASES = {
    "layer": ("bench_layer", ("--shapes", "8x16x24,3x40x8", "--no-compile"), 12, PEERS),
    "compiled layer": ("bench_layer", (*LAYER, "--dropout", "0"), 4, [*PEERS, contestants.COMPILED]),
    "dora": ("bench_dora", LAYER, 6, ["lora_ext, LoRA", "lora_ext", "peft accelerated", "peft"]),
    "host": ("bench_host", ("--rank", "4"), len(bench_host.PASSES), PEERS),
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
}


@pytest.mark.parametrize("name", CASES)
def test_layers_are_measured_next_to_their_peers(name, run, monkeypatch):
    monkeypatch.setattr(bench_host, "CALLS", 2)
    monkeypatch.setattr(bench_rows, "WIDTHS", 128)
    script, options, count, peers = CASES[name]
    rows = run(script, *options)["rows"]
    assert len(rows) == count
    for row in rows:
        assert list(row["ratio"]) == peers
        assert all(median > 0 for median, *_ in row["ratio"].values())
        assert all(value > 0 for value in row.get("microseconds", {}).values())
    keys = ("dtype", "pass", "dropout", "shape", "case", "implementation")
    measured = {tuple(str(row.get(key)) for key in keys) for row in rows}
    assert len(measured) == count  # each row something else


def test_bottleneck(run):
    rows = run("bench_bottleneck", "--shapes", "8x16x16", "--size", "4")["rows"]
    assert all(list(row["training"]) == list(row["forward"]) == ["lora_ext", "compiled"] for row in rows)
    assert len(rows) == 2
    with pytest.raises(SystemExit, match="--shapes 8 x 16 -> 24: a bottleneck's residual is its input"):
        run("bench_bottleneck", "--shapes", "8x16x24")


def test_merge(run, monkeypatch):
    monkeypatch.setattr(bench_merge, "widths", lambda shapes: [(24, 40)])
    assert [row["shape"] for row in run("bench_merge")["rows"]] == [[24, 40], [24, 40]]


@pytest.fixture
def one_round(monkeypatch):
    """Measures processes, which import for seconds, once. test_harness.py has several rounds."""
    measure_all = own_process.measure_all
    monkeypatch.setattr(own_process, "measure_all", lambda names, rounds, one: measure_all(names, 1, one))


@pytest.mark.usefixtures("one_round")
def test_offline_merge(run, monkeypatch):
    for name, size in {"HIDDEN": 64, "INTERMEDIATE": 48, "KEY_VALUE": 8, "VOCABULARY": 40, "SHARD_BYTES": 9000}.items():
        monkeypatch.setattr(bench_offline_merge, name, size)
    monkeypatch.delitem(bench_offline_merge.CONTESTANTS, "PEFT")  # its process imports for seconds
    result = run("bench_offline_merge", "--layers", "2", "--rank", "2")
    assert [row["name"] for row in result["rows"]] == ["merge", "merge, float16"]
    assert all(row["seconds"] > 0 and row["beyond_torch_bytes"] < result["bound_bytes"] for row in result["rows"])


def test_inject(run, monkeypatch):
    measured = functools.cache(bench_inject.seconds_to_import)
    monkeypatch.setattr(bench_inject, "seconds_to_import", lambda m: 9.0 if m == "peft" else measured(m))  # slow
    rows = run("bench_inject", "--layers", "1", "--imports", "2")["rows"]
    what = {"adapt 7 layers", "switch 1 of 2 adapters", "switch 1 of 8 adapters", "import, after torch"}
    assert {row["what"] for row in rows} == what
    assert {row["contestant"] for row in rows} >= {"lora_ext", "get_peft_model", "peft"}
    with pytest.raises(SystemExit, match="import no_such_module failed: ModuleNotFoundError"):
        measured("no_such_module")


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
    options = ("--steps", "4", "--most-steps", "4", "--evaluate-every", "2", "--accuracy", "1.01")
    result = run("bench_finetune", *TINY, *options)
    rows = result["rows"]
    assert [row["contestant"] for row in rows] == 8 * ["head only", "frozen", "lora_ext", "peft", "peft accelerated"]
    assert all(row["peak_bytes"] >= row["activation_bytes"] for row in rows)
    for i in range(0, len(rows), 5):
        _, frozen, ours, theirs, accelerated = (row["activation_bytes"] for row in rows[i : i + 5])
        assert frozen < ours < theirs and accelerated == ours
    # The same curve up to rounding.
    ours, theirs = (torch.tensor(result["losses"][name]) for name in ("lora_ext", "peft"))
    assert len(ours) == 4 and len(set(result["losses"]["peft"])) == 4
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert "NOT reached in 4 steps" in capsys.readouterr().out
    assert all(entry["steps"] == 4 and not entry["reached"] for entry in result["accuracy"].values())
    result = run("bench_finetune", *TINY, "--steps", "2", "--evaluate-every", "2", "--accuracy", "0")
    assert all(entry["steps"] == 2 and entry["reached"] for entry in result["accuracy"].values())


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


def test_without_the_demo_the_rest_is_measured(run, monkeypatch, capsys):
    def missing():
        raise CommandError("cannot fetch the demo data: no network")

    monkeypatch.setattr(bench_finetune.demo, "reviews", missing)
    result = run("bench_finetune", *TINY)
    assert "the demo model is NOT measured: cannot fetch the demo data: no network" in capsys.readouterr().out
    assert len(result["rows"]) == 7 * 5 and "losses" not in result


def test_rounded_factors_err_as_autocast_does():
    errors = importlib.import_module("bench_factor_rounding").errors(tokens=64, width=64, rank=4)
    assert all(len(values) == 4 and max(values) < 0.01 for values in errors.values())
    exact, rounded, autocast = errors["lora_ext on the CPU"], errors["rounded once"], errors["PEFT under autocast"]
    assert max(exact[2:]) < 1e-5 < min(rounded[2:])
    assert all(value < 1.2 * other for value, other in zip(rounded, autocast, strict=True))
