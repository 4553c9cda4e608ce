"""Tests scripts/kernel_report.py: a kernel that breaks a rule fails the build."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

import lora_ext
from lora_ext import _load

pytestmark = [pytest.mark.cpu_only("is about the compiler's output"), pytest.mark.full]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "kernel_report.py"
sys.path.insert(0, str(SCRIPT.parent))

import cuda_binary  # noqa: E402
import kernel_report  # noqa: E402

EVERYTHING = dict(tensor_cores=True, wide_loads=True, wide_stores=True, async_copies=True)
INSTRUCTIONS = Counter({"all": 900, "HMMA": 64, "LDGSTS.128": 8, "LDG.128": 2, "STG.128": 4, "LDSM": 16})
BROKEN = [
    ({"stack": 16}, "has a stack frame of 16 bytes"),
    ({"local": 8}, "uses local memory"),
    ({"instructions": INSTRUCTIONS | {"local": 3}}, "uses local memory (3 LDL or STL)"),
    ({"instructions": INSTRUCTIONS | {"all": 0}}, "has no machine code"),
    ({"max_threads": 0}, "has no __launch_bounds__"),
    ({"name": "stray_kernel"}, "belongs to no family"),
    ({"instructions": INSTRUCTIONS | {"HMMA": 0}}, "has no HMMA"),
    ({"instructions": INSTRUCTIONS | {"LDGSTS.128": 0}}, "has no cp.async of 16 bytes"),
    ({"instructions": INSTRUCTIONS | {"STG.128": 0}}, "writes nothing 16 bytes wide"),
    ({"registers": 136}, "fits 1 times on an SM, want 2"),
    ({"shared": 62_401}, "wants 101377 bytes of shared memory, at most 101376"),
    ({"arch": "sm_80", "registers": 136}, "fits 1 times on an SM, want 2"),
    ({"arch": "sm_120", "max_threads": 1024, "registers": 32}, "fits 1 times on an SM, want 2"),
]


def test_a_kernel_that_breaks_a_rule_is_named(monkeypatch):
    family = kernel_report.Family("tiles", r"^tile_kernel", **EVERYTHING, dynamic_shared=40_000)
    monkeypatch.setattr(kernel_report, "FAMILIES", [family])
    good = cuda_binary.Kernel("sm_90a", "_Z4tile", 128, 0, 1024, 0, 256, INSTRUCTIONS, "tile_kernel<__half>")
    assert kernel_report.violations(good) == []
    table, broken = kernel_report.report([good, replace(good, arch="sm_100")])  # they agree and share a row
    assert broken == [] and "tile_kernel<__half>  90a,100" in table and "0+40000" in table
    assert len(table.splitlines()) == 2
    for change, text in BROKEN:
        changed = {name: Counter(value) if name == "instructions" else value for name, value in change.items()}
        (found,) = kernel_report.violations(replace(good, **changed))
        assert text in found, found


def test_the_kernels_that_were_built():
    library = Path(lora_ext.__file__).parent / "liblora_ext_cuda.so"
    if not library.exists():
        pytest.skip(f"no CUDA part: {_load.build_info()['no_cuda_reason']}")
    if cuda_binary.find_tools() is None:
        pytest.skip("no cuobjdump and nvdisasm on this machine; `make cuda` installs them")
    arch = f"sm_{_load.build_info()['cuda_archs'].split(',')[-1]}"  # one is enough here; `make cuda` checks all
    result = subprocess.run([sys.executable, SCRIPT, library, "--arch", arch], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    for kernel in ("dropout_mask_kernel", "mma::shrink_kernel", "mma::expand_short_kernel", "mma::token_sum_kernel"):
        assert kernel in result.stdout
    ptx = f"PTX of sm_{_load.build_info()['cuda_ptx']}" if _load.build_info()["cuda_ptx"] else "no PTX"
    assert f"for 1 architectures, {ptx}, 0 rules broken" in result.stdout
