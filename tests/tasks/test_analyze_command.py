"""Tests the command ``lora-ext analyze``: its files, interrupted runs, its directory, and mistakes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.analyzed import name_base, own_adapter, save_files
from support.checkpoint_files import save_checkpoint, snapshot
from support.models import bert, llama
from support.optional import Image
from torch import nn

from lora_ext import cli
from lora_ext.tasks import TaskError
from lora_ext.tasks.analyze import run as analyze
from lora_ext.tasks.shared.journal import Journal

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_files(tmp_path_factory.mktemp("files"))


# --- the command ------------------------------------------------------------------------------------------------------


def command(files: Path, out: Path, *more: str) -> list[str]:
    adapters = [str(files / name) for name in ("four", "six")]
    return ["analyze", "--adapter", *adapters, "--base", str(files / "base"), "--out", str(out), *more]


def test_the_command_writes_json_markdown_and_pictures(files, tmp_path, capsys, monkeypatch):
    arguments = command(files, tmp_path / "out", "--seed", "3")
    monkeypatch.setattr(sys, "argv", ["lora-ext", *arguments])
    assert cli.main(arguments) == 0
    assert f"{tmp_path / 'out'}: 6 layers; analysis.md, analysis.json, similarity_1_2.png" in capsys.readouterr().out
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert list(analysis) == [
        *("command", "date", "machine", "settings", "adapters", "base", "notes", "layers", "summary")
    ]
    assert analysis["command"] == ["lora-ext", *arguments]
    assert analysis["machine"]["torch"] == torch.__version__
    assert [(adapter["path"], adapter["r"], adapter["layers"]) for adapter in analysis["adapters"]] == [
        (str(files / "four"), [4], 4),
        (str(files / "six"), [6], 6),
    ]
    text = (tmp_path / "out" / "analysis.md").read_text()
    most = analysis["summary"]["adapters"][1]["most_changed"][0]
    assert f"| 2 | {most['name']} | {most['change']:.4g} |" in text
    every_layer = text.partition("## Every layer")[2]
    assert every_layer.count("| model.layers.0.self_attn.q_proj |") == 2
    for name in ("similarity_1_2.png", "spectrum.png", "change.png"):
        assert f"![{name}]({name})" in text
        with Image.open(tmp_path / "out" / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def comparable(out: Path) -> dict[str, bytes]:
    """Reads all files of a run, without its date."""
    found = snapshot(out)
    date = json.loads(found["analysis.json"])["date"].encode()
    return {name: content.replace(date, b"") for name, content in found.items()}


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Makes the files of an uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        patch.setattr(sys, "argv", ["lora-ext", *command(files, Path("out"))])
        assert cli.main(command(files, Path("out"))) == 0
        return comparable(Path("out"))


@pytest.mark.parametrize("finished", [0, 4])
def test_an_interrupted_run_is_continued_to_the_same_files(files, whole, tmp_path, monkeypatch, capsys, finished):
    measured, measure = [], analyze.measure

    def counted(layer, *arguments, **options):
        measured.append(layer.name)
        return measure(layer, *arguments, **options)

    def interrupted(layer, *arguments, **options):
        if len(measured) == finished:
            raise KeyboardInterrupt
        return counted(layer, *arguments, **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(analyze, "measure", interrupted)
    monkeypatch.setattr(sys, "argv", ["lora-ext", *command(files, Path("out"))])
    assert cli.main(command(files, Path("out"))) == 130
    assert "to continue: lora-ext analyze --resume --out out" in capsys.readouterr().err
    assert sorted(snapshot(Path("out"))) == ["analysis_settings.json", "layers.jsonl"]
    with open("out/layers.jsonl", "ab") as file:
        file.write(b'{"name": "model.layers.1.mlp.up_proj", "sha')  # cut off by a kill

    monkeypatch.setattr(analyze, "measure", counted)
    monkeypatch.setattr(sys, "argv", ["lora-ext", "analyze", "--resume", "--out", "out"])
    assert cli.main(["analyze", "--resume", "--out", "out"]) == 0
    assert measured == [json.loads(line)["name"] for line in whole["layers.jsonl"].splitlines()]  # each one once
    assert comparable(Path("out")) == whole


def test_a_resumed_run_keeps_its_settings_and_its_files(files, tmp_path, capsys):
    adapter = name_base(files / "four", tmp_path / "adapter", str(files / "base"))
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["analyze", "--adapter", str(adapter), "--layers", "q_proj", "--no-base", *out]) == 0
    before = snapshot(tmp_path / "out")
    for more, message in (
        (["--layers", "v_proj"], "was started with --layers q_proj, now v_proj"),
        (["--adapter", str(files / "six")], "was started with --adapter"),
        (["--overwrite"], "--resume continues the run in --out and --overwrite replaces it"),
    ):
        assert cli.main(["analyze", "--resume", *more, *out]) == 2
        assert message in capsys.readouterr().err
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    assert cli.main(["analyze", "--resume", *out]) == 2
    error = capsys.readouterr().err
    assert f"changed since the run in {tmp_path / 'out'} was started: {adapter / 'adapter_config.json'}" in error
    assert snapshot(tmp_path / "out") == before


def test_whose_directory_it_is(files, tmp_path, capsys):
    arguments = ["analyze", "--adapter", str(files / "four"), "--no-base", "--layers", "q_proj"]
    out = tmp_path / "out"
    assert cli.main([*arguments, "--out", str(out)]) == 0
    assert cli.main([*arguments, "--out", str(out)]) == 2
    assert "holds a run already; --resume continues it, --overwrite replaces it" in capsys.readouterr().err
    (out / "mine.txt").write_text("mine")
    both = [*arguments, "--overwrite", "--adapter", str(files / "six")]
    assert cli.main([*both, "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir() if path.suffix in (".png", ".txt")) == [
        *("change.png", "mine.txt", "similarity_1_2.png", "spectrum.png")
    ]
    assert cli.main([*arguments, "--out", str(files / "base"), "--overwrite"]) == 2
    assert "holds files that do not belong to an analysis; choose another directory" in capsys.readouterr().err
    assert cli.main(["analyze", "--resume", "--out", str(tmp_path / "none")]) == 2
    assert "holds no analysis to continue" in capsys.readouterr().err


def test_two_runs_do_not_write_one_file(tmp_path):
    with Journal(tmp_path / "file") as journal:
        journal.add({"a": 1})
        with pytest.raises(TaskError, match="another process is writing"):
            Journal(tmp_path / "file")
    with Journal(tmp_path / "file") as journal:
        assert journal.entries == [{"a": 1}]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no adapter is given; name one or more with --adapter"),
        (["--adapter", "nowhere"], "nowhere/adapter_config.json is missing"),
        (["--adapter", "{four}", "--base", "{four}"], "has no model.safetensors"),
        (["--adapter", "{four}", "--base", "{base}", "--no-base"], "exclude each other; give one of them"),
        (["--adapter", "{four}", "--layers", "("], "--layers '(' is not a regular expression"),
        (["--adapter", "{four}", "--layers", "k_proj"], "--layers 'k_proj' matches none of the 4 names, such as model"),
        (["--adapter", "{four}", "--directions", "0"], "--directions is 0, want at least 1"),
        (["--adapter", "{four}", "--seed", "-1"], "--seed is -1, want at least 0"),
        (["--adapter", "{four}", "{four}"], "names one of them twice"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(files, tmp_path, capsys, arguments, message):
    names = {name: str(files / name) for name in ("base", "four", "six")}
    arguments = [argument.format(**names) for argument in arguments]
    assert cli.main(["analyze", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ext: error: ") and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_adapters_that_do_not_fit_are_reported(files, tmp_path, capsys):
    torch.manual_seed(3)
    bert().save_pretrained(tmp_path / "bert")
    own_adapter(bert(), tmp_path / "query", 0, target_modules=["query"])
    wide = nn.Module()
    wide.model = nn.Module()
    wide.model.layers = nn.ModuleList([nn.ModuleDict({"self_attn": nn.ModuleDict({"q_proj": nn.Linear(24, 16)})})])
    own_adapter(wide, tmp_path / "wide", 0, target_modules=["q_proj"])
    four, out = str(files / "four"), ["--out", str(tmp_path / "out")]
    for arguments, messages in (
        (
            ["--adapter", four, "--base", str(tmp_path / "bert")],
            ["does not fit", "not in the base: model.layers.0", "--no-base"],
        ),
        (["--adapter", four, str(tmp_path / "query")], ["have no layer in common: nothing to compare"]),
        (
            ["--adapter", four, str(tmp_path / "wide")],
            ["not of one model", "model.layers.0.self_attn.q_proj is [16, 16] in one adapter and [16, 24] in another"],
        ),
    ):
        assert cli.main(["analyze", *arguments, *out]) == 2
        error = capsys.readouterr().err
        assert all(message in error for message in messages), error
        assert not (tmp_path / "out").exists()


def test_values_that_are_not_finite_are_named(files, tmp_path, capsys):
    broken = name_base(files / "four", tmp_path / "broken", str(files / "base"))
    values = load_file(broken / "adapter_model.safetensors")
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    values[key][0, 0] = torch.nan
    save_file(values, broken / "adapter_model.safetensors")
    assert cli.main(["analyze", "--adapter", str(broken), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "model.layers.1.mlp.up_proj in " in error and "lora_A or lora_B is not finite" in error

    weights = {key: value.clone() for key, value in llama().state_dict().items()}
    weights["model.layers.0.mlp.up_proj.weight"][3, 3] = torch.inf
    save_checkpoint(weights, tmp_path / "base")
    arguments = ["--adapter", str(files / "four"), "--base", str(tmp_path / "base"), "--out", str(tmp_path / "other")]
    assert cli.main(["analyze", *arguments]) == 2
    assert "model.layers.0.mlp.up_proj.weight of " in capsys.readouterr().err


def test_matplotlib_is_named_where_it_is_missing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["analyze", "--adapter", str(files / "four"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "analyze needs matplotlib: pip install" in error and "[analyze]" in error
