"""Runs the benchmarks from end to end at small sizes; their figures here mean nothing."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import tiny_decoder
from support.optional import Image, matplotlib  # noqa: F401
from support.tiny_classifier import reviews, save_model
from torch import nn

import lora_ext
from lora_ext import _load
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.conversations import Example as Conversation
from lora_ext.tasks.finetune.data import Example

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_analyze  # noqa: E402
import bench_bottleneck  # noqa: E402
import bench_experts  # noqa: E402
import bench_finetune  # noqa: E402
import bench_grouped  # noqa: E402
import bench_host  # noqa: E402
import bench_inject  # noqa: E402
import bench_language_model  # noqa: E402
import bench_merge  # noqa: E402
import bench_offline_merge  # noqa: E402
import bench_plan  # noqa: E402
import bench_siblings  # noqa: E402
import plots  # noqa: E402
import run_all  # noqa: E402
from harness import contestants, machine_isa, machine_load, report, timing, whole_models  # noqa: E402
from harness.machine_folder import machine_folder  # noqa: E402
from harness.shapes import Shape  # noqa: E402

pytestmark = [pytest.mark.cpu_only("runs the scripts on the CPU"), pytest.mark.full]

PEERS = list(contestants.LAYERS)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script's main() with options and returns its JSON. All scripts of a test share a results folder."""

    def of(script: str, *options: str) -> dict:
        arguments = [*options, "--rounds", "2", "--threads", "2", "--write", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}.py", *arguments])
        importlib.import_module(script).main()
        (path,) = [path for path in tmp_path.glob("*_cpu.json") if path.stem.removesuffix("_cpu") in script]
        result = json.loads(path.read_text())
        text = path.with_suffix(".md").read_text()
        assert result["heading"] in text and result["command"].startswith(f"python benchmarks/{script}.py ")
        assert "AMX" in result["heading"] and result["info"]["torch_cpu"]["aten"]
        return result

    return of


# --- every script -----------------------------------------------------------------------------------------------------


def test_stages(run):
    rows = run("bench_stages", "--shapes", "40x48x64", "--rank", "4")["rows"]
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    for row in rows:
        assert row["us"]["forward"] > 0 and row["gflop_s"] > 0


def test_layer(run, capsys):
    result = run("bench_layer", "--shapes", "8x16x24,3x40x8", "--no-compile")
    rows = result["rows"]
    assert PEERS == ["lora_ext", "peft", "peft accelerated", "loralib", "hand-written"]  # from the extra `bench`
    assert len(rows) == 2 * 2 * 3
    assert {(row["pass"], row["dropout"]) for row in rows} == {
        ("forward", 0.0),
        ("forward + backward", 0.0),
        ("forward + backward", 0.1),
    }
    assert all(list(row["ratio"]) == PEERS and row["rounds"] == 2 for row in rows)
    assert "forward + backward, dropout 0.1, times the frozen layer's:" in capsys.readouterr().out


def test_the_compiled_layer_is_one_graph_of_its_shape(run):
    rows = run("bench_layer", "--shapes", "8x16x24", "--dropout", "0")["rows"]
    assert all(list(row["ratio"]) == [*PEERS, contestants.COMPILED] for row in rows)


def test_a_machine_that_cannot_compile_measures_the_others(run, monkeypatch, capsys):
    class NotCompiled(contestants.HandWritten):
        def forward(self, x):
            raise RuntimeError("no working C compiler\nmore")

    monkeypatch.setattr(contestants, "make_compiled", NotCompiled)
    rows = run("bench_layer", "--shapes", "8x16x24", "--dropout", "0")["rows"]
    assert all(list(row["ratio"]) == PEERS for row in rows)
    expected = "compiled: not measured at 8 x 16 -> 24, RuntimeError: no working C compiler\n"
    assert expected in capsys.readouterr().out


def test_host(run, monkeypatch):
    monkeypatch.setattr(bench_host, "CALLS", 2)
    rows = run("bench_host", "--rank", "4")["rows"]
    assert [row["pass"] for row in rows] == list(bench_host.PASSES)
    assert all(row["microseconds"]["lora_ext"] > 0 and list(row["ratio"]) == PEERS for row in rows)


def test_siblings(run):
    rows = run("bench_siblings", "--shapes", "8x16x24")["rows"]
    assert all(list(row["ratio"]) == ["siblings", "separate", *PEERS[1:]] for row in rows) and len(rows) == 2


def test_grouped(run):
    forward = run("bench_grouped", "--shapes", "6x16x24", "--only", "forward", "--adapters", "4", "--rank", "4")["rows"]
    assert all(list(row["ratio"]) == ["frozen", *bench_grouped.CONTESTANTS] for row in forward) and len(forward) == 2
    assert all(row["gb_s"]["op alone"] > 0 and row["adapters"] == 4 for row in forward)
    trained = run("bench_grouped", "--shapes", "40x16x24", "--only", "training", "--rank", "4")["rows"]
    assert all(list(row["ratio"]) == ["frozen", *bench_grouped.TRAINED] for row in trained) and len(trained) == 2


def test_rows(run):
    options = "--cases", "3x1,4x5", "--adapters", "3", "--hidden", "64", "--blocks", "1", "--rank", "4"
    rows = run("bench_rows", *options)["rows"]
    assert [row["case"] for row in rows] == 2 * [[3, 1], [4, 5]]
    assert all(list(row["ratio"]) == ["frozen", "adapter_names", "pool", "peft", "peft accelerated"] for row in rows)
    assert all(list(row["overhead"]) == ["adapter_names", "pool", "peft accelerated"] for row in rows)


def test_disagreement_of_groups_is_refused(run, monkeypatch):
    class Wrong(bench_grouped.Grouped):
        def forward(self, x):
            return super().forward(x) + 1

    monkeypatch.setitem(bench_grouped.CONTESTANTS, "wrong", lambda base, As, Bs, groups: Wrong(base, As, Bs, groups))
    with pytest.raises(SystemExit, match="wrong and stack disagree by .*: not timed"):
        run("bench_grouped", "--shapes", "6x16x24", "--only", "forward")


TINY_EXPERTS = ["--experts=4", "--hidden=64", "--intermediate=128", "--tokens=8", "--top=2", "--rank=4", "--rounds=3"]


def test_experts(run):
    rows = run("bench_experts", *TINY_EXPERTS, "--implementation", "grouped_mm", "--implementation", "eager")["rows"]
    assert [row["implementation"] for row in rows] == ["grouped_mm", "eager"]
    for row in rows:
        assert list(row["ratio"]) == ["frozen", "peft accelerated", "lora_ext"]
        assert row["peak_bytes"]["peft"] > 4 * 64 * 128 * 4 and row["peak_ratio"]["lora_ext"] < 0.5


def test_disagreement_of_experts_is_refused(run, monkeypatch):
    make = bench_experts.make_contestants

    def wrong(block, rank):
        modules = make(block, rank)
        with torch.no_grad():
            bench_experts.trained(modules["lora_ext"])[0].add_(1.0)
        return modules

    monkeypatch.setattr(bench_experts, "make_contestants", wrong)
    with pytest.raises(SystemExit, match="lora_ext and peft disagree by .*: not timed"):
        run("bench_experts", *TINY_EXPERTS)


def test_bottleneck(run):
    rows = run("bench_bottleneck", "--shapes", "8x16x16", "--size", "4")["rows"]
    assert all(list(row["training"]) == list(row["forward"]) == ["lora_ext", "compiled"] for row in rows)
    assert len(rows) == 2
    with pytest.raises(SystemExit, match="--shapes 8 x 16 -> 24: a bottleneck's residual is its input"):
        run("bench_bottleneck", "--shapes", "8x16x24")


def test_disagreement_of_bottlenecks_is_refused(run, monkeypatch):
    monkeypatch.setattr(bench_bottleneck.Ours, "forward", lambda self, x: 1.1 * bench_bottleneck.Plain.forward(self, x))
    with pytest.raises(SystemExit, match="lora_ext is off by .*: not timed"):
        run("bench_bottleneck", "--shapes", "8x16x16")


def test_decode(run):
    rows = run("bench_decode", "--tokens", "1,3", "--widths", "64x128", "--stack-mib", "1")["rows"]
    assert [row["shape"] for row in rows] == 2 * [[1, 64, 128], [3, 64, 128]]
    assert [row["layers"] for row in rows] == [32, 32, 64, 64]  # 1 MiB of weights
    assert all(list(row["ratio"]) == PEERS for row in rows)


def test_merge(run, monkeypatch):
    monkeypatch.setattr(bench_merge, "widths", lambda shapes: [(24, 40)])
    assert [row["shape"] for row in run("bench_merge")["rows"]] == [[24, 40], [24, 40]]


def test_offline_merge(run, monkeypatch):
    for name, size in {"HIDDEN": 64, "INTERMEDIATE": 48, "KEY_VALUE": 8, "VOCABULARY": 40, "SHARD_BYTES": 9000}.items():
        monkeypatch.setattr(bench_offline_merge, name, size)
    for name in ("merge, verify", "PEFT"):  # their processes import for seconds
        monkeypatch.delitem(bench_offline_merge.CONTESTANTS, name)
    result = run("bench_offline_merge", "--layers", "2", "--rank", "2")
    assert [row["name"] for row in result["rows"]] == ["merge", "merge, record", "unmerge"]
    assert all(row["seconds"] > 0 and row["beyond_torch_bytes"] < result["bound_bytes"] for row in result["rows"])
    assert result["record_bytes"] > 0


def test_plan(run, monkeypatch):
    """Replaces the training; tests/tasks/test_plan.py trains in separate processes."""
    asked = []
    monkeypatch.setattr(bench_plan.training_memory, "growth", lambda *arguments: asked.append(arguments) or 2 * 10**8)
    rows = run("bench_plan", "--batch-size", "2", "--seq-len", "16")["rows"]
    assert [row["method"] for row in rows] == ["full", "lora", "adapter-h", "bitfit"]
    assert asked == [(row["method"], 2, 16, 8, 2, gives_back) for row in rows for gives_back in (True, False)]
    assert all(row["measured"] == {"given_back": 2 * 10**8, "as_it_is": 2 * 10**8} for row in rows)
    assert rows[0]["predicted"]["peak"] > rows[1]["predicted"]["peak"] > 9 * 10**7  # the weights alone


def test_analyze(run, monkeypatch):
    for name, size in {"HIDDEN": 32, "INTERMEDIATE": 48, "KEY_VALUE": 8}.items():
        monkeypatch.setattr(bench_analyze, name, size)
    monkeypatch.delitem(bench_analyze.CONTESTANTS, "analyze, without the weights")  # imports for seconds
    result = run("bench_analyze", "--rank", "2")
    ours, full = result["rows"]
    assert (ours["name"], full["name"]) == ("analyze", "one layer in full")
    assert ours["extrapolated_seconds"] == pytest.approx(32 * ours["seconds"])
    # A block has two layers of 32 x 32, two of 8 x 32 and three of 48 x 32.
    cost = 2 * 32**3 + 2 * 8 * 8 * 32 + 3 * 48 * 32**2
    assert full["extrapolated_seconds"] == pytest.approx(32 * cost / 32**3 * full["seconds"])
    assert result["nbytes"] == 2 * (2 * 32 * 32 + 2 * 8 * 32 + 3 * 48 * 32)


def test_inject(run, monkeypatch):
    measured = bench_inject.seconds_to_import
    monkeypatch.setattr(bench_inject, "seconds_to_import", lambda m: 9.0 if m == "peft" else measured(m))  # slow
    rows = run("bench_inject", "--layers", "1", "--imports", "2")["rows"]
    what = {"adapt 7 layers", "switch 1 of 2 adapters", "switch 1 of 8 adapters", "import, after torch"}
    assert {row["what"] for row in rows} == what
    assert {row["contestant"] for row in rows} >= {"lora_ext", "get_peft_model", "peft"}
    with pytest.raises(SystemExit, match="import no_such_module failed: ModuleNotFoundError"):
        measured("no_such_module")


def test_curves(run):
    result = run(
        "bench_curves", "--of-rank", "2,4", "--of-tokens", "3", "--of-width", "16,24", "--tokens", "5", "--width", "8"
    )
    assert [(row["axis"], row[row["axis"]]) for row in result["rows"][::2]] == [
        ("rank", 2),
        ("rank", 4),
        ("tokens", 3),
        ("width", 16),
        ("width", 24),
    ]
    assert result["fixed"] == {"rank": 16, "tokens": 5, "width": 8}


ROOFLINE = ("--shapes", "8x64x64", "--memory-mib", "1", "--cache-kib", "16", "--matrix", "32", "--stack-mib", "1")


def test_roofline(run):
    result = run("roofline", *ROOFLINE)
    assert set(result["ceilings"]) == {"copy", "read", "copy_in_cache", "matrix_float32", "matrix_bfloat16"}
    rows = [row for row in result["rows"] if row["dtype"] == "float32" and row["contestant"] == "lora_ext"]
    assert [row["what"] for row in rows] == ["forward", "forward + backward", "decode", "merge"]
    x, weight, factors = 8 * 64, 64 * 64, 16 * 2 * 64
    flops, numbers = 2 * 8 * (weight + factors), 2 * x + weight + factors
    assert rows[0]["flops_per_byte"] == pytest.approx(flops / (4 * numbers))
    assert rows[3]["flops_per_byte"] == pytest.approx(2 * 16 * weight / (4 * (2 * weight + factors)))


TINY = ("--layers", "1", "--width", "64", "--bert-batch", "2", "--length", "8")
TINY += ("--llama-width", "64", "--llama-batch", "1", "--llama-length", "8", "--llama-rank", "2")


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path_factory):
    """Replaces the demo by a tiny model and few reviews."""
    examples = [Example(text, label, line) for line, (text, label) in enumerate(reviews(120))]
    path = save_model(tmp_path_factory.mktemp("model"))
    monkeypatch.setattr(bench_finetune.demo, "model_path", lambda: path)
    monkeypatch.setattr(bench_finetune.demo, "examples", lambda: examples)


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


def test_an_accuracy_that_is_reached_ends_the_training(run, tiny_demo):
    result = run("bench_finetune", *TINY, "--steps", "2", "--evaluate-every", "2", "--accuracy", "0")
    assert all(entry["steps"] == 2 and entry["reached"] for entry in result["accuracy"].values())


def test_language_model(run, monkeypatch, tmp_path):
    """The same losses as PEFT's on packed conversations; Gemma's GGUF files of base models have no template."""
    turns = [(("user", question), ("assistant", answer)) for question, answer in tiny_decoder.questions(30)]
    examples = [Conversation(pair, 0, line) for line, pair in enumerate(turns, start=1)]
    monkeypatch.setattr(bench_language_model.demo, "examples", lambda: examples)
    path = tiny_decoder.save(tmp_path / "model", tiny_decoder.gemma3(), template=None)
    options = ("--model", str(path), "--max-length", "64", "--steps", "4", "--learning-rate", "5e-3")
    result = run("bench_language_model", *options)
    assert [row["contestant"] for row in result["rows"]] == ["frozen", "lora_ext", "peft", "peft accelerated"]
    ours, theirs = (torch.tensor(result["losses"][name]) for name in ("lora_ext", "peft"))
    assert len(ours) == 4 and len(set(ours.tolist())) == 4
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_without_the_demo_the_rest_is_measured(run, monkeypatch, capsys):
    def missing():
        raise TaskError("cannot fetch the demo data: no network")

    monkeypatch.setattr(bench_finetune.demo, "examples", missing)
    result = run("bench_finetune", *TINY)
    assert "the demo model is NOT measured: cannot fetch the demo data: no network" in capsys.readouterr().out
    assert len(result["rows"]) == 7 * 5 and "losses" not in result


# --- no timing of contestants that disagree ---------------------------------------------------------------------------


class WrongOutput(contestants.HandWritten):
    def forward(self, x):
        return super().forward(x) * 1.02  # twice bfloat16's tolerance


class WrongGradient(contestants.HandWritten):
    def forward(self, x):
        frozen = super().forward(x).detach()
        return frozen + (super().forward(x) - frozen) * 1.5


class NotANumber(contestants.HandWritten):
    def forward(self, x):
        return super().forward(x) * float("nan")


@pytest.mark.parametrize("wrong", [WrongOutput, WrongGradient, NotANumber])
@pytest.mark.parametrize("script", ["bench_layer", "bench_decode"])
def test_disagreement_is_refused(script, wrong, run, monkeypatch, tmp_path):
    monkeypatch.setitem(contestants.LAYERS, "wrong", wrong)
    sizes = (
        ("--shapes", "8x16x24", "--no-compile")
        if script == "bench_layer"
        else ("--widths", "16x24", "--stack-mib", "1")
    )
    monkeypatch.setattr(report.Report, "interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(SystemExit, match="wrong and lora_ext disagree by .*: not timed"):
        run(script, *sizes)
    assert not list(tmp_path.iterdir())


def test_disagreement_of_siblings_is_refused(run, monkeypatch):
    monkeypatch.setitem(bench_siblings.CONTESTANTS, "wrong", bench_siblings.separate(WrongGradient))
    with pytest.raises(SystemExit, match="wrong and siblings disagree by .*: not timed"):
        run("bench_siblings", "--shapes", "8x16x24")


def test_models_adapted_in_different_layers_are_refused():
    pytest.importorskip("peft")
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["0"]}
    ours = lora_ext.inject(nn.Sequential(nn.Linear(4, 4)), lora_ext.LoraConfig(**options))
    with pytest.raises(SystemExit, match=r"adapt different layers: \['0'\]: not timed"):
        whole_models.copy_factors(ours, nn.Sequential(nn.Linear(4, 4)))


# --- time, options, machine -------------------------------------------------------------------------------------------


def test_cases_share_the_time(monkeypatch, capsys):
    args = report.parser("A question?", "name").parse_args(["--seconds", "90"])
    now = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: now[0])
    run = report.Report(args, "title")
    shares = []
    for spent in run.cases([5.0, 60.0, 30.0, 1.0]):
        shares.append(run.case_s)
        now[0] += spent
    assert shares == [20.0, 20.0, 12.5]  # at most 20 of 22.5 and 28.3; half of 25
    assert "out of time: 1 cases are not measured" in capsys.readouterr().out


def test_slow_calls_warm_up_once_and_stop_early(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def clock(call):
        now[0] += 10.0
        return 10.0

    seconds = timing.interleaved({"a": None}, rounds=60, budget_s=20.0, clock=clock)
    assert seconds == {"a": [10.0] * 5} and now[0] == 60.0


def test_options_are_checked(capsys):
    parser = report.parser("A question?", "name")
    report.add_shapes(parser)
    for options, message in (
        (["--rounds", "1"], "'1', want an integer of at least 2"),
        (["--shapes", "1x2"], "'1x2' is not TOKENSxINxOUT"),
        (["--shapes", "0x2x3"], "'0x2x3' is not TOKENSxINxOUT"),
        (["--machine-isa", "mmx"], "'mmx'"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(options)
        assert message in capsys.readouterr().err
    assert parser.parse_args(["--shapes", "1x2x3,4x5x6"]).shapes == [Shape(1, 2, 3), Shape(4, 5, 6)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["bench_layer", "roofline", "run_all"])
def test_without_a_gpu_cuda_is_refused(script, monkeypatch):
    monkeypatch.setattr(sys, "argv", [script, "--device", "cuda"])
    with pytest.raises(SystemExit, match="--device cuda: torch .* finds no GPU here"):
        importlib.import_module(script).main()


@pytest.mark.skipif("avx2" not in _load.available_cpu_isas(), reason="no AVX2 here")
def test_an_instruction_set_binds_the_whole_process(tmp_path):
    command = [sys.executable, BENCHMARKS / "roofline.py", *ROOFLINE, "--rounds", "2", "--write"]
    subprocess.run([*command, "--machine-isa", "avx2", "--results", tmp_path], check=True, capture_output=True)
    result = json.loads((tmp_path / "roofline_cpu_avx2.json").read_text())
    assert result["info"]["cpu"]["isa"] == "avx2"
    assert result["info"]["torch_cpu"] == {"onednn_limit": "AVX2", "mkl_limit": "AVX2", "aten": "AVX2", "amx": False}
    assert "limited to AVX2, without AMX" in result["heading"]


def test_amx_is_used_unless_forbidden(monkeypatch):
    for limit, permitted in (("AVX512_CORE_BF16", False), ("AVX2", False), ("AVX512_CORE_AMX", True), ("ALL", True)):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        facts = machine_isa.facts()
        assert facts["onednn_limit"] == limit and (permitted or not facts["amx"])


def test_the_load_of_others_excludes_this_process(monkeypatch):
    # all time, busy time, this process's time: others used 10 of 40 s
    readings = iter([(100.0, 50.0, 3.0), (140.0, 65.0, 8.0)])
    monkeypatch.setattr(machine_load.MachineLoad, "_seconds", staticmethod(lambda: next(readings)))
    assert machine_load.MachineLoad().of_others() == pytest.approx(0.25)


@pytest.mark.parametrize(
    "model, folder",
    [
        ("AMD EPYC", "amd_epyc"),
        ("AMD EPYC 9B45 96-Core Processor", "amd_epyc_9b45"),
        ("Intel(R) Xeon(R) Processor", "intel_xeon"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "intel_core_i7_8700"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),
    ],
)
def test_a_machine_has_a_folder(model, folder, monkeypatch):
    assert machine_folder(model) == folder
    monkeypatch.setattr(report.info, "cpu_model", lambda: model)
    assert report.results_folder("cpu") == BENCHMARKS / "results" / folder


def test_results_go_to_the_folder_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report.info, "cpu_model", lambda: "AMD EPYC 9B45 96-Core Processor")
    run = report.Report(report.parser("A question?", "name").parse_args(["--write"]), "title")
    run.finish([], "table")
    folder = tmp_path / "amd_epyc_9b45"
    assert sorted(path.name for path in folder.iterdir()) == ["name_cpu.json", "name_cpu.md"]
    assert json.loads((folder / "name_cpu.json").read_text())["cpu"] == "AMD EPYC 9B45 96-Core Processor"


# --- pictures and the whole run ---------------------------------------------------------------------------------------


def test_pictures_are_drawn_from_the_json_files_alone(run, tmp_path, capsys):
    run("bench_layer", "--shapes", "8x16x24,3x40x8", "--no-compile")
    run("bench_curves", "--of-rank", "2,4", "--of-tokens", "3", "--of-width", "16,24", "--tokens", "5", "--width", "8")
    run("roofline", *ROOFLINE)
    drawn = plots.draw(tmp_path, "cpu")
    assert [path.name for path in drawn] == ["layer_cpu.png", "curves_cpu.png", "roofline_cpu.png"]
    assert "decode_cpu.json is missing: no picture of it" in capsys.readouterr().out
    for path in drawn:
        with Image.open(path) as image:
            assert image.width == plots.WIDTH * plots.DPI and len(image.getcolors()) > 2
        assert path.stat().st_size < 100_000


def test_decode_is_drawn_with_gaps(tmp_path):
    """A panel or a contestant can be missing, because time ran out."""
    ratios = {"lora_ext": [1.1, 1.0, 1.2], "peft": [1.2, 1.1, 1.3]}
    rows = [
        {"shape": [1, 8, 8], "dtype": "float32", "ratio": ratios},
        {"shape": [2, 8, 8], "dtype": "float32", "ratio": {"lora_ext": [1.0, 1.0, 1.0]}},
        {"shape": [1, 8, 16], "dtype": "float32", "ratio": ratios},
        {"shape": [1, 8, 8], "dtype": "bfloat16", "ratio": ratios},
    ]
    (tmp_path / "decode_cpu.json").write_text(json.dumps({"heading": "title; machine", "rows": rows}))
    assert [path.name for path in plots.draw(tmp_path, "cpu", say=lambda _: None)] == ["decode_cpu.png"]


def test_a_script_that_fails_is_named_and_the_others_run(monkeypatch, tmp_path, capfd):
    ran = "import sys, pathlib; pathlib.Path(sys.argv[sys.argv.index('--results') + 1], '{}').touch(); sys.exit({})"
    for name, status in (("bad", 3), ("good", 0)):
        (tmp_path / f"{name}.py").write_text(ran.format(name, status))
    (tmp_path / "plots.py").write_text(ran.format("pictures", 0))
    monkeypatch.setattr(run_all, "HERE", tmp_path)
    monkeypatch.setattr(run_all, "SCRIPTS", {"bad": ["bad.py", "--seconds", "1"], "good": ["good.py"]})
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--results", str(tmp_path)])
    assert run_all.main() == 1
    assert {"bad", "good", "pictures"} <= {path.name for path in tmp_path.iterdir()}
    out = capfd.readouterr().out
    assert "bad: FAILED (3)" in out and "good: done" in out and out.endswith("FAILED: bad\n")
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--results", str(tmp_path), "--only", "good"])
    assert run_all.main() == 0


def test_the_whole_run_names_scripts_that_exist(monkeypatch):
    assert all((BENCHMARKS / command[0]).is_file() for command in run_all.SCRIPTS.values())
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "layer,laier"])
    with pytest.raises(SystemExit, match="no benchmark laier; there are layer, siblings, "):
        run_all.main()
