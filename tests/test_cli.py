from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_classifier

from lora_ext import cli


def run_python(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*([path] if path else []), *sys.path])}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def test_info_as_text_and_json():
    text = run_python("-m", "lora_ext", "info")
    assert (text.returncode, text.stderr) == (0, "")
    assert "CPU kernels" in text.stdout
    assert json.loads(run_python("-m", "lora_ext", "info", "--json").stdout)["version"]


def test_help_and_info_do_not_import_transformers():
    code = "import sys; from lora_ext.cli import main; main(['info']); print('transformers' in sys.modules)"
    assert run_python("-c", code).stdout.endswith("False\n")
    result = run_python("-m", "lora_ext", "finetune", "--help")
    assert result.returncode == 0
    assert "--target-modules" in result.stdout


def test_missing_extra_is_named(tmp_path: Path):
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['matplotlib'] = None; from lora_ext.cli import main; "
        f"sys.exit(main(['finetune', '--out', {str(tmp_path / 'out')!r}]))"
    )
    result = run_python("-c", code)
    assert result.returncode == 2, result.stderr
    assert "finetune needs transformers, matplotlib: pip install 'lora_ext[finetune]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dora"], "--method is 'dora', want one of full, bitfit"),
        (["--epochs", "0"], "--epochs is 0.0, want a finite number above 0"),
        (["--batch-size", "-1"], "--batch-size is -1, want a finite number above 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan, want a finite number above 0"),
        (["--warmup", "1"], "--warmup is 1.0, want 0 <= warmup < 1"),
        (["--eval-file", "x.csv"], "--eval-file goes with --data"),
        (["--data", "x.parquet"], "x.parquet: the suffix '.parquet' is none of .csv, .tsv, .jsonl"),
        (["--data", "nowhere.csv"], "nowhere.csv: cannot be read: No such file"),
        (["--resume"], "holds no run to continue"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    assert cli.main(["finetune", "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lora-ext: error: ")
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_resumed_run_keeps_its_settings_and_refuses_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tiny_classifier.save_model(tmp_path / "model")
    data = tiny_classifier.save_reviews(tmp_path / "data.csv", tiny_classifier.reviews(60))
    out = ["--out", str(tmp_path / "out")]
    chosen = ["--model", str(model), "--data", str(data), "--target-modules", "query", "--max-length", "32", "--r", "3"]
    assert cli.main(["finetune", *out, *chosen, "--epochs", "1"]) == 0
    capsys.readouterr()

    assert cli.main(["finetune", *out, "--resume", "--r", "4", "--epochs", "3"]) == 2
    error = capsys.readouterr().err
    assert f"--resume: the run in {tmp_path / 'out'} was started with --r 3, now 4, --epochs 1.0, now 3.0" in error

    assert cli.main(["finetune", *out, "--resume", "--r", "3"]) == 0
    output = capsys.readouterr().out
    assert "test accuracy" in output
    assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 3
