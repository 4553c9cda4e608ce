"""Pictures from the results of benchmarks, and the run of all scripts."""

import json
import sys
from pathlib import Path

from support.optional import Image, matplotlib  # noqa: F401

# isort: split
import plots
import pytest
import run_all

pytestmark = [pytest.mark.cpu_only("runs the scripts on the CPU"), pytest.mark.full]

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_pictures_are_drawn_from_the_json_files_alone(run, tmp_path, capsys):
    run("bench_layer", "--shapes", "8x16x24,3x40x8", "--no-compile")
    (path,) = plots.draw(tmp_path, "cpu")
    assert path.name == "layer_cpu.png"
    assert "decode_cpu.json is missing: no picture of it" in capsys.readouterr().out
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
