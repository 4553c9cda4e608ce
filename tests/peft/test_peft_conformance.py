"""The conformance run on a small stand-in for PEFT's source tree: its output, and that it can fail."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import run_forked

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
def test_lora_at_a_float_s_mercy():
    ours = type(model().base_model.model[0]) is not peft.tuners.lora.Linear
    assert not (ours and torch.initial_seed() == FIRST)
"""


# The script with runs that fork instead of starting a Python each: importing PEFT takes six seconds.
FORKED = f"""
import os, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import lora_ext.integrations.peft, peft_conformance, pytest

class Forked:
    def __init__(self, command, cwd, env, stdout, stderr):
        self.child = os.fork()
        if self.child == 0:
            os.chdir(cwd)
            os.environ.update(env)
            os.dup2(stdout.fileno(), 1)
            os.dup2(1, 2)
            code = pytest.main(command[3:])
            sys.stdout.flush()
            os._exit(code)

    def wait(self):
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

peft_conformance.subprocess.Popen = Forked
sys.exit(peft_conformance.main())
"""


def save(source: Path, tests: str) -> list[str]:
    """Writes a source tree; returns the script's arguments."""
    (source / "tests").mkdir()
    (source / "tests" / "test_custom_models.py").write_text(tests)
    return [str(source), "--other-seeds", "1"]


def test_a_difference_fails_and_rounding_is_tried_again(tmp_path):
    first = "import zlib; FIRST = zlib.crc32(b'tests/test_custom_models.py::test_lora_at_a_float_s_mercy')\n"
    done = run_forked("-c", FORKED, *save(tmp_path, TESTS + ONLY_PEFT + first + ROUNDING), OMP_NUM_THREADS="1")
    assert done.returncode == 1
    assert "PEFT alone: 1 failed, 3 passed, 1 skipped\nwith lora_ext: 3 failed, 1 passed, 1 skipped\n" in done.stdout
    assert "through lora_ext: 1 calls of lora_linear, 1 calls of merge_all_" in done.stdout
    assert "FAILS with lora_ext, passes without: tests/test_custom_models.py::test_lora_of_peft_itself" in done.stdout
    assert "not from the first: tests/test_custom_models.py::test_lora_at_a_float_s_mercy" in done.stdout


def test_layers_that_never_ran_fail(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from peft_conformance import complaints

    calls = {"lora_linear": 3, "merge_all_": 1}
    assert complaints(set(), calls) == [] and complaints({"test"}, calls) == [
        "FAILS with lora_ext, passes without: test"
    ]
    assert complaints(set(), {"lora_linear": 3}) == ["FAILS: merge_all_ never ran, so nothing was tested"]
    assert "lora_linear and merge_all_ never ran" in complaints(set(), {})[0]


def test_a_tree_that_cannot_be_tested(tmp_path):
    done = run_forked("-c", FORKED, *save(tmp_path, "import no_such_module"), OMP_NUM_THREADS="1")
    assert done.returncode == 1 and "pytest ended with 2" in done.stderr and "no_such_module" in done.stderr
    done = subprocess.run([sys.executable, str(SCRIPT), str(tmp_path / "absent")], capture_output=True, text=True)
    assert done.returncode == 1 and "is not a source tree of peft" in done.stderr and "PEFT_SOURCE" in done.stderr


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(SCRIPT.parent.parent))
