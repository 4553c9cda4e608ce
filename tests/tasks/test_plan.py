"""Tests ``lora-ext plan``: its options, files, advice and refusals. test_plan_figures.py has the bytes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import shlex
import sys
from pathlib import Path

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, MixtralConfig, T5Config

from lora_ext.cli import finetune as finetune_command
from lora_ext.cli import main
from lora_ext.cli.training import options_of
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.settings import CausalSettings
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.plan import results
from lora_ext.tasks.plan.run import PlanSettings, plan

LAYERS, D_MODEL = 3, 32


@pytest.fixture
def gpt2_directory(tmp_path) -> str:
    config = GPT2Config(vocab_size=50, n_positions=64, n_embd=D_MODEL, n_layer=LAYERS, n_head=4)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


# --- the command ------------------------------------------------------------------------------------------------------


def command(*options: str, model: str) -> list[str]:
    lora = [] if "--method" in options else ["--target-modules", "q,v", "--r", "2"]
    return ["plan", "--model", model, "--seq-len", "32", "--batch-size", "4", *lora, *options]


def test_console_and_files(gpt2_directory, tmp_path, capsys):
    out = tmp_path / "plan"
    options = ["--dtype", "bf16", "--gpu-memory", "1MB", "--reserve", "1KB", "--disk", "1TB", "--out", str(out)]
    assert main(command(*options, model=gpt2_directory)) == 0
    printed = capsys.readouterr().out
    saved = json.loads((out / "plan.json").read_text())
    trained = 2 * LAYERS * 2 * D_MODEL * 2
    assert (
        saved["runs"]["lora"]["trained_parameters"] == trained
        and saved["runs"]["lora"]["checkpoint_bytes"] == 4 * trained
    )
    assert saved["disk"]["checkpoints"]["lora"] == (10**12 - saved["disk"]["base_bytes"]) // (4 * trained)
    assert saved["capacity"]["usable"] == 999_000
    assert sorted(path.name for path in out.iterdir()) == ["plan.json", "plan.md", "plan.png"]
    document = (out / "plan.md").read_text()
    for row in results.rows(saved):
        assert all(cell in printed for cell in row)
        assert f"| {' | '.join(row)} |" in document
    assert "lora fits" in printed or "lora does not fit" in printed
    assert "bfloat16 weights" in printed.splitlines()[0]

    assert main(command("--out", str(out), model=gpt2_directory)) == 2  # it exists already
    error = capsys.readouterr().err  # there is no --resume
    assert f"--out {out} holds a run already; --overwrite replaces it\n" in error
    assert main(command("--out", str(out), "--overwrite", model=gpt2_directory)) == 0


def test_several_devices(gpt2_directory, capsys):
    options = ["--devices", "64", "--tensor-parallel", "4"]
    assert main(command(*options, "--json", model=gpt2_directory)) == 0
    runs = json.loads(capsys.readouterr().out)["devices"]["runs"]
    assert set(runs) == {"full", "lora"}
    lora = runs["lora"]
    assert lora["adapter_reduced_bytes"] > 0 == runs["full"]["adapter_reduced_bytes"]
    assert lora["scattered_bytes"] < runs["full"]["scattered_bytes"]
    assert main(command(*options, model=gpt2_directory)) == 0
    printed = capsys.readouterr().out
    assert "predicted on 64 devices (16 x 4: sharded by FSDP2 over 16, layers split over 4; H100 SXM" in printed
    assert f"lora: {results.readable(lora['memory'])} at the peak" in printed


def test_json_is_printed(gpt2_directory, capsys):
    assert main(command("--json", "--task", "classification", model=f"{gpt2_directory}/config.json")) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["task"] == "classification" and printed["capacity"] is None
    assert set(printed["runs"]) == {"full", "lora", "inference"}


def test_autocast_is_planned(gpt2_directory, capsys):
    """On the CPU too; in the title and in the options of finetune."""
    kept = {}
    for precision in ("float32", "bfloat16"):
        assert main(command("--json", "--precision", precision, model=gpt2_directory)) == 0
        result = json.loads(capsys.readouterr().out)
        kept[precision] = result["runs"]["lora"]["kept"]
    assert kept["bfloat16"] != kept["float32"]
    assert "4 x 32 tokens, cuda, bfloat16 by autocast" in results.title(result)
    at = result["finetune_options"].index("--precision")
    assert result["finetune_options"][at + 1] == "bfloat16"
    assert main(command("--precision", "fp8", model=gpt2_directory)) == 2
    assert "--precision is 'fp8', want one of float32, bfloat16" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "less"),
    [
        (["--gradient-checkpointing"], "activations"),
        (["--dtype", "bf16"], "weights"),
        (["--dtype", "nf4"], "weights"),
        (["--optimizer", "sgd"], "optimizer_state"),
        (["--r", "1"], "optimizer_state"),
        (["--batch-size", "2"], "activations"),
    ],
)
def test_options_reach_the_planner(gpt2_directory, capsys, options, less):
    found = []
    for given in ([], options):
        assert main(command("--json", *given, model=gpt2_directory)) == 0
        result = json.loads(capsys.readouterr().out)
        found.append(result["runs"][result["method"]])
    assert found[1][less] < found[0][less]


def test_accumulation_has_gradients_in_the_forward(gpt2_directory):
    settings = Settings(model=gpt2_directory, method="full", max_length=32, batch_size=4)
    first, later = (plan(PlanSettings(settings, accumulation_steps=steps))["runs"]["full"] for steps in (1, 2))
    assert later["gradients"] == later["all_gradients"] > first["gradients"]


def test_every_kind_of_method(tmp_path):
    config = BertConfig(
        vocab_size=50, hidden_size=D_MODEL, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    config.save_pretrained(tmp_path)
    for method in ("adapter-drop", "head-only", "prefix-embed", "lora+prefix-layer"):
        options = {"drop_layers": 1} if method == "adapter-drop" else {}
        result = plan(PlanSettings(Settings(model=str(tmp_path), method=method, max_length=16, **options)))
        run = result["runs"][method]
        assert 0 < run["trained_parameters"] < result["parameters"]
        assert run["weights"] + run["optimizer_state"] < result["runs"]["full"]["optimizer_state"]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--optimizer", "lion"], ["optimizer is 'lion'", "adamw, adamw-master, adamw8bit"]),
        (["--dtype", "fp8"], ["dtype is 'fp8'", "float32, bfloat16, float16, int8, nf4"]),
        (["--method", "magic"], ["--method is 'magic'", "bitfit"]),
        (["--task", "poetry"], ["--task is 'poetry'", "causal-lm"]),
        (["--seq-len", "0"], ["--seq-len is 0"]),
        (["--seq-len", "65"], ["--seq-len is 65", "at most 64 tokens"]),
        (["--batch-size", "0"], ["--batch-size is 0"]),
        (["--accumulation-steps", "0"], ["--accumulation-steps is 0"]),
        (["--gpu-memory", "1GB"], ["--reserve takes all of --gpu-memory"]),
        (["--tensor-parallel", "2"], ["--tensor-parallel goes with --devices"]),
        (["--devices", "8", "--tensor-parallel", "3"], ["--tensor-parallel", "want a divisor of the 8 devices"]),
        (["--method", "full", "--dtype", "int8"], ["--method full", "frozen linear layers"]),
        (["--method", "head-only"], ["--method head-only", "no new head to train"]),
        (["--target-modules", "query"], ["--method lora", "matches no module"]),
    ],
)
def test_mistakes(gpt2_directory, capsys, options, fragments):
    assert main(command(*options, model=gpt2_directory)) == 2
    printed = capsys.readouterr().err
    assert all(fragment in printed for fragment in fragments), printed


def test_a_config_that_says_too_little(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 16}')
    with pytest.raises(TaskError, match="no config that transformers knows.*model_type"):
        plan(PlanSettings(Settings(model=str(tmp_path))))
    with pytest.raises(TaskError, match="built-in models: gpt3-175b"):
        plan(PlanSettings(Settings(model=str(tmp_path / "nothing"))))
    for name, message in {"model.gguf": "a GGUF file, which only", "model.safetensors": "a file; name the dir"}.items():
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(TaskError, match=f"no config that transformers knows: it is {message}"):
            plan(PlanSettings(Settings(model=str(tmp_path / name))))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TaskError, match="is an adapter, and no model"):
        plan(PlanSettings(Settings(model=str(tmp_path))))


def test_models_of_other_kinds(tmp_path):
    T5Config(vocab_size=50, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4).save_pretrained(tmp_path / "t5")
    settings = Settings(model=str(tmp_path / "t5"), target_modules="q,v", max_length=16)
    with pytest.raises(TaskError, match="no model of the type 't5' for --task causal-lm"):
        plan(PlanSettings(settings, task="causal-lm"))
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4
    )
    config.save_pretrained(tmp_path / "llama")
    with pytest.raises(TaskError, match="bitfit: .* has no biases"):
        plan(PlanSettings(Settings(model=str(tmp_path / "llama"), method="bitfit", max_length=16)))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (37_748_736, "37.7 MB"), (999_600, "1.00 MB"), (1.4e12, "1.40 TB"),
     (3.5e13, "35.0 TB"), (349.2e9, "349 GB"), (1.2e16, "12,000 TB")],
)  # fmt: skip
def test_bytes_for_people(count, text):
    assert results.readable(count) == text


# --- labels, and missing matplotlib -----------------------------------------------------------------------------------


def test_labels_are_counted(tmp_path):
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    config.save_pretrained(tmp_path)
    settings = Settings(model=str(tmp_path), method="head-only", max_length=16)
    for labels in (None, 7):
        result = plan(PlanSettings(settings, num_labels=labels))
        assert result["num_labels"] == (labels or 2)
        assert result["runs"]["head-only"]["trained_parameters"] == (labels or 2) * (32 + 1)
        assert f"classification of {labels or 2} labels; " in results.title(result)
    assert plan(PlanSettings(Settings()))["num_labels"] == 3


def test_labels_of_a_language_model_are_refused(gpt2_directory, capsys):
    assert main(["plan", "--model", gpt2_directory, "--num-labels", "3"]) == 2
    assert "--num-labels goes with --task classification; a language model has none" in capsys.readouterr().err


def test_text_takes_no_matplotlib_and_a_picture_says_that_it_does(gpt2_directory, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    options = ["plan", "--model", gpt2_directory, "--method", "bitfit", "--seq-len", "16"]
    assert main(options) == 0
    assert main([*options, "--out", str(tmp_path / "out"), "--json"]) == 0
    captured = capsys.readouterr()
    assert "plan.png is left out, because it needs matplotlib: pip install" in captured.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plan.json", "plan.md"]


# --- options of finetune, and warnings --------------------------------------------------------------------------------


def save_bert(directory: Path, layers: int) -> str:
    options = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "max_position_embeddings": 64}
    BertConfig(vocab_size=50, num_hidden_layers=layers, **options).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def bert_directory(tmp_path) -> str:
    return save_bert(tmp_path / "bert", 4)


@functools.cache
def planned_by_finetune(options: tuple[str, ...]) -> dict:
    """Plans the run that finetune would do with ``options``."""
    parser = argparse.ArgumentParser()
    finetune_command.add_parser(parser.add_subparsers())
    settings = Settings(**options_of(parser.parse_args(["finetune", *options, "--out", "x"])))
    return plan(
        PlanSettings(
            settings,
            dtype=settings.quantize or settings.dtype,
            gradient_checkpointing=settings.gradient_checkpointing != "no",
            accumulation_steps=settings.accumulation_steps,
            optimizer={"": "adamw", "optim=adafactor": "adafactor"}[settings.set],
        )
    )


@pytest.mark.parametrize("optimizer", [pytest.param("adamw", marks=pytest.mark.full), "adafactor"])
def test_what_fits_can_be_pasted_into_finetune(tmp_path, optimizer):
    model = save_bert(tmp_path / "bert", 2)
    settings = Settings(model=model, r=2, target_modules="query,value", batch_size=12, max_length=64)
    whole = PlanSettings(settings, accumulation_steps=3, optimizer=optimizer)
    peak = plan(whole)["runs"]["lora"]["peak"]
    found = set()
    for part in (0.95, 0.8, 0.4, 0.1) if optimizer == "adamw" else (0.4,):
        result = plan(dataclasses.replace(whole, gpu_memory=int(part * peak), reserve=0))
        for change in result["capacity"]["changes"]:
            options, setup = change["finetune_options"], change["setup"]
            if change["devices"] > 1:
                assert options is None
                continue
            assert ("--quantize" in options) == (setup["dtype"] in ("int8", "nf4"))
            assert planned_by_finetune(tuple(options))["runs"]["lora"]["peak"] == change["peak"]
            assert int(options[1]) * int(options[3]) >= 36  # texts in an optimizer step
            found.add(change["what"][0].split()[0])
        assert results.notes(result)[-1].strip()
        lines = [shlex.split(line) for line in results.notes(result) if line.strip().startswith("lora-ext finetune")]
        changes = [change["finetune_options"] for change in result["capacity"]["changes"]]
        assert [line[2:] for line in lines] == [options for options in changes if options is not None]
    wanted = {"gradient", "batches", "texts", "bfloat16"} if optimizer == "adamw" else {"batches", "texts"}
    assert found >= wanted, found
    fits = plan(dataclasses.replace(whole, gpu_memory=2 * peak, reserve=0))
    assert planned_by_finetune(tuple(fits["finetune_options"]))["runs"]["lora"]["peak"] == peak
    assert results.notes(fits)[-1].startswith(
        "lora-ext finetune --batch-size 12 --accumulation-steps 3 --max-length 64 "
    )


@pytest.mark.parametrize("method", ["lora", "full", "bitfit", "adapter-h"])
def test_the_options_for_a_language_model_start_the_planned_run(method, gpt2_directory, tmp_path, capsys, monkeypatch):
    common = ["plan", "--json", "--model", gpt2_directory, "--seq-len", "16", "--method", method]
    assert main(common) == 0
    options, started = json.loads(capsys.readouterr().out)["finetune_options"], []
    monkeypatch.setattr("lora_ext.tasks.causal_lm.run.finetune", lambda settings, *_, **__: started.append(settings))
    assert main(["finetune", *options, "--out", str(tmp_path / "out")]) == 0
    sizes = {"model": gpt2_directory, "batch_size": 16, "max_length": 16}
    assert started == [CausalSettings(method=method, **sizes)]
    assert main([*common, "--task", "classification"]) == 0
    assert "--task" not in json.loads(capsys.readouterr().out)["finetune_options"]


def test_the_options_name_the_model_where_there_is_one(gpt2_directory, bert_directory, capsys):
    def options(model: str, *more: str) -> list[str] | None:
        assert main(["plan", "--json", "--model", model, "--seq-len", "16", *more]) == 0
        return json.loads(capsys.readouterr().out)["finetune_options"]

    assert options(gpt2_directory, "--method", "prefix-embed") is None  # not for language models
    assert "--model PATH_OR_ID" in shlex.join(options("llama3-8b"))  # a config, and no model
    # finetune's other defaults with --quantize are those of the plan: rank 8 on all linear layers alone
    first = ["--batch-size", "16", "--accumulation-steps", "1", "--max-length", "16", "--dtype", "bfloat16"]
    first += ["--gradient-checkpointing", "no", "--model", bert_directory]
    assert options(bert_directory, "--dtype", "nf4") == [*first, "--quantize", "nf4"]
    settings = Settings(model=bert_directory, max_length=16)  # rank 4, embeddings
    named = plan(PlanSettings(settings, dtype="nf4"))["finetune_options"]
    assert planned_by_finetune(tuple(named))["runs"] == plan(PlanSettings(settings, dtype="nf4"))["runs"]


def test_the_command_takes_finetunes_options(bert_directory, capsys):
    common = ["plan", "--json", "--model", bert_directory, "--seq-len", "32"]
    peaks = {}
    for options in ([], ["--gradient-checkpointing"], ["--gradient-checkpointing", "reentrant"]):
        assert main([*common, *options]) == 0
        result = json.loads(capsys.readouterr().out)
        peaks[tuple(options)] = result["runs"]["lora"]["peak"]
    plain, one, other = peaks.values()
    assert plain > one == other
    assert "--gradient-checkpointing reentrant" in shlex.join(result["finetune_options"])
    assert main([*common, "--optimizer", "adamw-master"]) == 0
    assert json.loads(capsys.readouterr().out)["finetune_options"] is None  # not among the Trainer's optimizers


def test_a_mixture_of_experts_is_planned_in_16_bits(tmp_path, capsys):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 2}
    config = MixtralConfig(**sizes)
    config.architectures = ["MixtralForCausalLM"]
    config.save_pretrained(tmp_path)
    common = ["plan", "--model", str(tmp_path), "--seq-len", "16", "--lora-dropout", "0"]
    assert main(common) == 2
    assert "mixtral cannot run without data" in (error := capsys.readouterr().err)
    assert error.endswith("; give --dtype bfloat16\n")
    assert main([*common, "--dtype", "bfloat16"]) == 0


def test_warnings(bert_directory, gpt2_directory, capsys):
    language = Settings(model=gpt2_directory, r=2, target_modules="q,v", max_length=32, batch_size=8)
    adapter = 2 * LAYERS * 2 * D_MODEL * 2  # parameters
    assert plan(PlanSettings(language, texts=adapter // 32))["warnings"] == []
    (warning,) = plan(PlanSettings(language, texts=adapter // 32 + 1))["warnings"]
    assert f"the adapter has {adapter:,} parameters for {32 * (adapter // 32 + 1):,} tokens" in warning
    assert warning.endswith("as many parameters need --r 3, or a smaller rank with --target-modules all-linear")
    everywhere = dataclasses.replace(language, target_modules="all-linear")
    (warning,) = plan(PlanSettings(everywhere, texts=10**6))["warnings"]
    assert warning.endswith(f"no rank up to the largest layer's, {D_MODEL}, has as many parameters: try --method full")
    assert plan(PlanSettings(language.with_method("full"), texts=10**9))["warnings"] == []

    assert plan(PlanSettings(language, accumulation_steps=4))["warnings"] == []
    (warning,) = plan(PlanSettings(language, accumulation_steps=5))["warnings"]
    assert warning.startswith("a step has 40 texts: with large batches LoRA falls behind full fine-tuning, at any rank")

    labels = Settings(model=bert_directory, r=1, target_modules="query", max_length=32)
    adapter = 4 * 2 * 64
    assert plan(PlanSettings(labels, num_labels=4, texts=adapter // 2))["warnings"] == []
    (warning,) = plan(PlanSettings(labels, num_labels=4, texts=adapter // 2 + 1))["warnings"]
    assert f"for {adapter // 2 + 1:,} labels ({adapter + 2:,} bits)" in warning
    assert main(["plan", "--model", bert_directory, "--seq-len", "16", "--batch-size", "64", "--texts", "9"]) == 0
    assert "\nwarning: a step has 64 texts" in capsys.readouterr().out
    with pytest.raises(TaskError, match="--texts is 0, want at least 1"):
        PlanSettings(labels, texts=0)
