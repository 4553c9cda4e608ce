"""``--config``: a file of options equals the command line, and mistakes in it are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_lines import parsed

from lora_ext import cli
from lora_ext.tasks.finetune.settings import Settings

pytestmark = [pytest.mark.cpu_only("the Trainer chooses the device"), pytest.mark.full]


def test_a_file_equals_the_command_line_which_wins(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "# a run\nepochs: 3\nlearning_rate: 1e-3\nbatch-size: 8\ntarget_modules: [query, value]\nno-measure: true\n"
        "gradient_checkpointing: true\nlora_alpha: 32\nout: there\n"
        "set:\n  weight_decay: 0.1\n  lr_scheduler_kwargs: {num_cycles: 0.5}\n  torch_compile: false\n"
    )
    given = parsed("--config", str(file), "--epochs", "1", "--set", "weight_decay=0.2")
    same = parsed(
        *["--epochs", "1", "--learning-rate", "0.001", "--batch-size", "8", "--target-modules", "query,value"],
        *["--no-measure", "--gradient-checkpointing", "--lora-alpha", "32", "--out", "there"],
        *["--set", "weight_decay=0.2", "--set", 'lr_scheduler_kwargs={"num_cycles": 0.5}'],
        *["--set", "torch_compile=false", "--config", str(file)],
    )
    assert {**vars(given), "run": None} == {**vars(same), "run": None}

    file.write_text("methods: [lora, 'lora:r=2']\nseeds: [0, 3]\nr: 4\nout: there\n")
    given = parsed(f"--config={file}", command="compare")
    assert (given.methods, given.seeds, given.r) == (["lora", "lora:r=2"], [0, 3], 4)
    file.write_text("ranks: 1,2\ntargets: q;q,v\nout: there\n")
    given = parsed("--config", str(file), "--seeds", "5", command="sweep")
    assert (given.ranks, given.targets, given.seeds) == ([1, 2], ["q", "q,v"], [5])
    file.write_text(
        "seed: 010\nmodel: 1.10\ndata: 2026-11-28T10:00:00Z\nout: 1e3\nset: {lr_scheduler_kwargs: {min_lr: 1e-5}}"
    )
    given = parsed("--config", str(file))
    assert (given.seed, given.model, given.data, str(given.out)) == (10, "1.10", "2026-11-28T10:00:00Z", "1e3")
    assert given.set == """'lr_scheduler_kwargs={"min_lr": 1e-05}'"""
    file.write_text("")
    assert parsed("--config", str(file), "--out", "x").epochs == Settings().epochs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "'epoch' is not an option; close matches: 'epochs'"),
        ("resume: true", "'resume' is not an option"),
        ("epochs: many", "epochs is 'many': want float"),
        ("epochs: 1:30", "epochs is '1:30': want float"),
        ("r: 0x10", "r is '0x10': want int"),
        ("r: 1.5", "r is '1.5': want int"),
        ("r:", "r has no value"),
        ("r: {a: 1}", "r is {'a': 1}, want one value"),
        ("model: [a, b]", "model is ['a', 'b'], want one value"),
        ("label-column: no", "label-column is false, want text; put yes, no, on and off in quotes"),
        ("batch_size: 4\nbatch-size: 8", "batch-size occurs twice, with - and with _"),
        ("no-measure: 3", "no-measure is 3, want true or false"),
        ("set: weight_decay=1", "set is 'weight_decay=1', want names and values below it"),
        ("set: {weigth_decay: 1}", "--set weigth_decay: transformers.TrainingArguments has no such field"),
        ("r: 1\nr: 2", "no YAML: 'r' occurs 2 times below line 1"),
        ("[1, 2]", "holds no options, such as 'epochs: 3'"),
        ("r: [", "no YAML: while parsing"),
        ("a: !!python/object:os.system 1", "no YAML: could not determine a constructor"),
    ],
)
def test_what_a_file_may_not_hold(tiny: Settings, tmp_path: Path, capsys, content: str, message: str):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    options = ["--model", tiny.model, "--data", tiny.data, "--max-length", "32", "--out", str(tmp_path / "out")]
    assert cli.main(["finetune", "--config", str(file), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_missing(tmp_path: Path, capsys):
    assert cli.main(["finetune", "--config", str(tmp_path / "none.yaml"), "--out", "x"]) == 2
    assert "none.yaml: cannot be read: No such file" in capsys.readouterr().err


def test_a_run_from_a_file_resumes(tiny: Settings, tmp_path: Path, capsys):
    file = tmp_path / "run.yaml"
    values = {"model": tiny.model, "data": tiny.data, "max_length": 32, "epochs": 1, "set": {"weight_decay": 0.1}}
    file.write_text(json.dumps(values | {"accumulation_steps": 2, "out": str(tmp_path / "out")}))  # JSON is YAML
    assert cli.main(["finetune", "--config", str(file), "--no-measure"]) == 0
    first = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert first["settings"]["set"] == "weight_decay=0.1"
    assert cli.main(["finetune", "--config", str(file), "--resume", "--no-measure"]) == 0
    assert cli.main(["finetune", "--resume", "--task", "causal-lm", "--out", str(tmp_path / "out")]) == 2
    assert "was started with --task classification, now causal-lm" in capsys.readouterr().err
    again = ["finetune", "--config", str(file), "--resume", "--set", "weight_decay=0.3"]
    assert cli.main(again) == 2
    assert "was started with --set weight_decay=0.1, now weight_decay=0.3" in capsys.readouterr().err
