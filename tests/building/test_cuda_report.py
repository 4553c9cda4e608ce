"""Tests scripts/kernel_report.py: it parses the CUDA tools' output, and a kernel that breaks a rule fails the build."""

import re
import subprocess
import sys
from collections import Counter
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

# Shortened output of cuobjdump --dump-resource-usage --dump-sass for two objects.
CODE = """
Fatbin elf code:
arch = sm_90a
Resource usage:
 Function _Z1f6Params:
  REG:64 STACK:0 SHARED:11264 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z1g6Params:
  REG:255 STACK:48 SHARED:0 LOCAL:8 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_90a
		Function : _Z1g6Params
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                                /* 0x00000a00ff017b82 */
                                                                                         /* 0x000fe20000000800 */
        /*0010*/                   STL.64 [R1+0x8], R4 ;                                 /* 0x0000000000047919 */
        /*0020*/               @P0 LDL R4, [R1] ;                                        /* 0x0000880000047ab9 */
        /*0030*/                   LDG.E R4, desc[UR4][R2.64] ;                          /* 0x0000880000047ab9 */
		Function : _Z1f6Params
        /*0000*/                   LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR8][R2.64] ;  /* 0x0000880000047ab9 */
        /*0010*/              @!P1 LDG.E.128.CONSTANT R8, desc[UR8][R2.64] ;             /* 0x0000880000047ab9 */
        /*0020*/                   LDSM.16.MT88.4 R4, [R8] ;                             /* 0x0000880000047ab9 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;                 /* 0x0000880000047ab9 */
        /*0040*/             @UP0 HMMA.16816.F32.BF16 R4, R8, R10, R4 ;                  /* 0x0000880000047ab9 */
       /*10050*/                   STG.E.128 desc[UR8][R2.64], R4 ;                      /* 0x0000880000047ab9 */
        /*0060*/                   LDG.E.LTC128B.64 R4, desc[UR8][R2.64] ;               /* 0x0000880000047ab9 */

Fatbin elf code:
arch = sm_80
Resource usage:
 Function _Z1f6Params:
  REG:80 STACK:0 SHARED:10240 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
	code for sm_80
		Function : _Z1f6Params
        /*0000*/                   EXIT ;                                                /* 0x0000880000047ab9 */
"""

ELF = """
.nv.info._Z1f6Params
	Attribute:	EIATTR_MAXREG_COUNT
	Value:	0xff
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x20 0x8 0x1
	Attribute:	EIATTR_CRS_STACK_SIZE
	Value:	0x0
.nv.info._Z1g6Params
	Attribute:	EIATTR_CRS_STACK_SIZE
	Value:	0x0
"""

# Shortened output of cuobjdump --dump-ptx for two objects.
PTX = """
Fatbin ptx code:
.target sm_80
.visible .entry _Z1f6Params(
	.param .align 8 .b8 _Z1f6Params_param_0[24]
)
.func helper(
.entry _Z1h6Params(
Fatbin ptx code:
.target sm_90a, debug
.weak .entry _Z1g6Params(
"""


def test_reads_resources_and_instructions():
    f, g, f80 = cuda_binary.parse_code(CODE.splitlines())
    assert (f.arch, f.symbol, f.registers, f.stack, f.shared, f.local) == ("sm_90a", "_Z1f6Params", 64, 0, 11264, 0)
    expected = {"all": 7, "HMMA": 2, "LDGSTS.128": 1, "LDG.128": 1, "STG.128": 1, "LDSM": 1}
    assert f.instructions == expected  # LTC128B is a cache hint, not a width
    assert (g.registers, g.stack, g.local) == (255, 48, 8)
    assert g.instructions == {"all": 4, "local": 2}
    assert (f80.arch, f80.registers, f80.instructions) == ("sm_80", 80, {"all": 1})
    assert cuda_binary.parse_max_threads(ELF.splitlines()) == {"_Z1f6Params": 256}
    assert cuda_binary.parse_ptx(PTX.splitlines()) == {"80": {"_Z1f6Params", "_Z1h6Params"}, "90a": {"_Z1g6Params"}}


# --- the rules, on an invented family ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def families(request, monkeypatch):
    if "good" in request.fixturenames:
        everything = dict(tensor_cores=True, wide_loads=True, wide_stores=True, async_copies=True)
        family = kernel_report.Family("tiles", r"^tile_kernel", **everything, dynamic_shared=40_000)
        monkeypatch.setattr(kernel_report, "FAMILIES", [family])


@pytest.fixture
def good():
    """Makes a kernel that follows every rule."""
    instructions = Counter({"all": 900, "HMMA": 64, "LDGSTS.128": 8, "LDG.128": 2, "STG.128": 4, "LDSM": 16})
    return cuda_binary.Kernel("sm_90a", "_Z4tile", 128, 0, 1024, 0, 256, instructions, "tile_kernel<__half>")


def test_a_good_kernel_breaks_no_rule(good):
    assert kernel_report.violations(good) == []
    twin = cuda_binary.Kernel(**{**vars(good), "arch": "sm_100"})
    table, broken = kernel_report.report([good, twin])  # architectures that agree share a row
    assert broken == [] and "tile_kernel<__half>  90a,100" in table and "0+40000" in table
    assert len(table.splitlines()) == 2


@pytest.mark.parametrize(
    "change, text",
    [
        ({"stack": 16}, "has a stack frame of 16 bytes"),
        ({"local": 8}, "uses local memory"),
        ({"count": ("local", 3)}, r"uses local memory \(3 LDL or STL\)"),
        ({"count": ("all", 0)}, "has no machine code"),
        ({"max_threads": 0}, "has no __launch_bounds__"),
        ({"name": "stray_kernel"}, "belongs to no family"),
        ({"count": ("HMMA", 0)}, "has no HMMA"),
        ({"count": ("LDGSTS.128", 0)}, r"has no cp.async of 16 bytes"),
        ({"count": ("STG.128", 0)}, "writes nothing 16 bytes wide"),
        ({"registers": 136}, "fits 1 times on a multiprocessor, want 2"),
        ({"shared": 62_401}, "wants 101377 bytes of shared memory, at most 101376"),
        ({"arch": "sm_80", "registers": 136}, "fits 1 times on a multiprocessor, want 2"),
        ({"arch": "sm_120", "max_threads": 1024, "registers": 32}, "fits 1 times on a multiprocessor, want 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_rule_can_be_broken(good, change, text):
    if count := change.pop("count", None):
        good.instructions[count[0]] = count[1]
    for name, value in change.items():
        setattr(good, name, value)
    (found,) = kernel_report.violations(good)
    assert re.search(text, found), found


# --- the library that was built ---------------------------------------------------------------------------------------


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
