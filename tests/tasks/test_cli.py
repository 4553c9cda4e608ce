from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from support import tiny_classifier
from support.processes import run_python

from lora_ext import cli
from lora_ext._common.install_hint import install_hint
from lora_ext.tasks.finetune.settings import Settings

pytestmark = pytest.mark.cpu_only("starts processes")


def test_missing_extra_is_named(tmp_path: Path):
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['matplotlib'] = None; from lora_ext.cli import main; "
        f"sys.exit(main(['finetune', '--out', {str(tmp_path / 'out')!r}]))"
    )
    result = run_python("-c", code)
    assert result.returncode == 2, result.stderr
    assert "finetune needs transformers, matplotlib: pip install" in result.stderr
    assert "[finetune]" in result.stderr


def installed(tmp_path: Path, monkeypatch, noted: object) -> None:
    """Makes an installation with pip's note of its origin."""
    information = tmp_path / "site" / "lora_ext-0.1.0.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    lines = ["Metadata-Version: 2.1", "Name: lora_ext", "Version: 0.1.0", "Requires-Dist: torch>=2.11"]
    lines += ['Requires-Dist: transformers>=5.0; extra == "finetune"', 'Requires-Dist: matplotlib; extra == "finetune"']
    lines += ['Requires-Dist: lora_ext[finetune]; extra == "demo"', 'Requires-Dist: a-model; extra == "demo"']
    (information / "METADATA").write_text("\n".join(lines) + "\n")
    (information / "direct_url.json").write_text(noted if isinstance(noted, str) else json.dumps(noted))
    monkeypatch.syspath_prepend(str(information.parent))


def test_hints_install_from_where_the_package_is_from(tmp_path: Path, monkeypatch):
    checkout = tmp_path / "a checkout"
    checkout.mkdir()
    url = checkout.as_uri()
    monkeypatch.setattr(
        "lora_ext._common.install_hint.__file__", str(tmp_path / "site" / "lora_ext" / "_common" / "install_hint.py")
    )
    brings = " (it installs transformers, matplotlib, a-model)"
    for noted, expected in [
        ({"url": url, "dir_info": {}}, f"pip install '{checkout}[demo]'"),
        ({"url": url, "dir_info": {"editable": True}}, f"pip install --editable '{checkout}[demo]'"),
        ({"url": f"{url}/gone", "dir_info": {}}, "pip install 'lora_ext[demo]'"),
        (
            {"url": "https://host/x.git", "vcs_info": {"vcs": "git", "commit_id": "0f3"}},
            "pip install 'lora_ext[demo] @ git+https://host/x.git@0f3'",
        ),
        ("", "pip install 'lora_ext[demo]'"),
        ("damaged", "pip install 'lora_ext[demo]'"),
        ('{"url": 3}', "pip install 'lora_ext[demo]'"),
    ]:
        installed(tmp_path, monkeypatch, noted)
        importlib.invalidate_caches()
        assert install_hint("demo") == expected + brings
    monkeypatch.setattr(
        "lora_ext._common.install_hint.__file__", str(checkout / "lora_ext" / "_common" / "install_hint.py")
    )
    (checkout / "pyproject.toml").touch()
    assert install_hint("demo") == f"pip install '{checkout}[demo]'{brings}"


def test_threads_that_wait_sleep_unless_the_user_says_otherwise(monkeypatch):
    """finetune replaces its process, which has loaded OpenMP by then; compare starts processes anyway."""
    done = []
    monkeypatch.setattr(cli, "main", lambda: done.append(os.environ.get("OMP_WAIT_POLICY")))
    monkeypatch.setattr(os, "execv", lambda path, arguments: done.append(arguments[1:]))

    def started(name: str) -> list:
        done.clear()
        monkeypatch.setattr(sys, "argv", ["lora-ext", name])
        monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "lora_ext", name])
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        cli.command()
        return [*done]

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert started("finetune") == [["-m", "lora_ext", "finetune"], "passive"]
    assert started("compare") == ["passive"]
    monkeypatch.setenv("GOMP_SPINCOUNT", "10000")
    assert started("finetune") == [None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "dora"], "--method is 'dora', want one of full, bitfit"),
        (["--epochs", "0"], "--epochs is 0.0, want a finite number above 0"),
        (["--batch-size", "-1"], "--batch-size is -1, want a finite number above 0"),
        (["--learning-rate", "nan"], "--learning-rate is nan, want a finite number above 0"),
        (["--warmup", "1"], "--warmup is 1.0, want 0 <= warmup < 1"),
        (["--eval-file", "x.csv"], "--test-file goes with --data"),
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


def test_a_resumed_run_computes_with_as_many_threads_as_before(tmp_path: Path, capsys, monkeypatch):
    """The last bits of sums depend on the number of threads."""
    used, before = [], torch.get_num_threads()
    monkeypatch.setattr("lora_ext.tasks.finetune.run.finetune", lambda *a, **k: used.append(torch.get_num_threads()))
    Settings().save(tmp_path, threads=1)
    try:
        for options, expected in (([], 1), (["--threads", "3"], 3)):
            torch.set_num_threads(2)
            assert cli.main(["finetune", "--resume", "--out", str(tmp_path), *options]) == 0
            assert used.pop() == expected
        assert capsys.readouterr().out == "with 1 threads, as the run was started; --threads changes that\n"
        torch.set_num_threads(2)
        assert cli.main(["finetune", "--out", str(tmp_path / "new")]) == 0 and used.pop() == 2
    finally:
        torch.set_num_threads(before)
