"""The conformance run on a small stand-in for PEFT's source tree: its output, and that it can fail."""

from pathlib import Path

import pytest
from support.processes import run_python

pytestmark = pytest.mark.full

SCRIPT = Path(__file__).parents[2] / "scripts" / "peft_conformance.py"

TESTS = """
import peft, pytest, torch
from torch import nn

def model():
    return peft.get_peft_model(nn.Sequential(nn.Linear(6, 10)), peft.LoraConfig(target_modules=["0"]))

def test_lora_merges():
    adapted, x = model(), torch.randn(3, 6)
    y = adapted(x)
    adapted.merge_adapter()
    torch.testing.assert_close(adapted(x), y)

def test_lora_skips():
    pytest.skip("no network")

def test_lora_fails_with_both():
    raise AssertionError

def test_not_selected():
    raise AssertionError
"""
ONLY_PEFT = """
def test_lora_of_peft_itself():
    assert type(model().base_model.model[0]) is peft.tuners.lora.Linear
"""
ROUNDING = """
import zlib

def test_lora_at_a_float_s_mercy():
    ours = type(model().base_model.model[0]) is not peft.tuners.lora.Linear
    first = zlib.crc32(b"tests/test_custom_models.py::test_lora_at_a_float_s_mercy")
    assert not (ours and torch.initial_seed() == first)
"""


@pytest.mark.slow  # three runs of pytest, which import PEFT's tests' libraries
def test_a_difference_fails_and_rounding_is_tried_again(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_custom_models.py").write_text(TESTS + ONLY_PEFT + ROUNDING)
    done = run_python(SCRIPT, tmp_path, "--other-seeds", "1", OMP_NUM_THREADS="1", PYTHONPATH=str(SCRIPT.parents[1]))
    assert done.returncode == 1, done.stderr
    assert "PEFT alone: 1 failed, 3 passed, 1 skipped\nwith lora_ext: 3 failed, 1 passed, 1 skipped\n" in done.stdout
    assert "through lora_ext: 1 calls of lora_linear, 1 calls of merge_all_" in done.stdout
    assert "FAILS with lora_ext, passes without: tests/test_custom_models.py::test_lora_of_peft_itself" in done.stdout
    assert "not from the first: tests/test_custom_models.py::test_lora_at_a_float_s_mercy" in done.stdout


def test_layers_that_never_ran_fail(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from peft_conformance import complaints

    calls = {"lora_linear": 3, "merge_all_": 1}
    assert complaints(set(), calls) == []
    assert complaints({"test"}, calls) == ["FAILS with lora_ext, passes without: test"]
    assert complaints(set(), {"lora_linear": 3}) == ["FAILS: merge_all_ never ran, so nothing was tested"]
    assert "lora_linear and merge_all_ never ran" in complaints(set(), {})[0]


def test_a_tree_that_cannot_be_tested(tmp_path):
    done = run_python(SCRIPT, tmp_path)
    assert done.returncode == 1 and "is not a source tree of peft" in done.stderr and "PEFT_SOURCE" in done.stderr
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_custom_models.py").write_text("import no_such_module")
    done = run_python(SCRIPT, tmp_path)
    assert done.returncode == 1 and "pytest ended with 2" in done.stderr and "no_such_module" in done.stderr
