"""Restricts the whole process to one instruction set: lora_ext's kernels, oneDNN, MKL and ATen.

``LORA_EXT_CPU_ISA`` alone would compare this package on an older machine with its peers on this one. The libraries
read their limits once, when they load, so the process restarts to apply a limit.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

# The variables' values, from the most capable set down. None of these sets has AMX, which oneDNN's bfloat16 products
# use unless it is forbidden. MKL obeys on Intel's processors only.
LIMITS = {
    "avx512_bf16": ("avx512_bf16", "AVX512_CORE_BF16", "AVX512_E3", "avx512"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512", "avx512"),
    "avx2": ("avx2", "AVX2", "AVX2", "avx2"),
    "generic": ("generic", "SSE41", "SSE4_2", "default"),
}
VARIABLES = ("LORA_EXT_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


def restrict(isa: str | None) -> None:
    """Restarts this process under the limits of ``isa`` unless they apply already. None: no limits."""
    if isa is None:
        return
    limits = dict(zip(VARIABLES, LIMITS[isa], strict=True))
    if any(os.environ.get(name) != value for name, value in limits.items()):
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | limits)


def facts() -> dict[str, object]:
    """Returns the instruction sets that PyTorch's kernels may use here, ready for JSON."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA")
    try:
        has_amx = re.search(r"^flags\s*:.*\bamx_bf16\b", Path("/proc/cpuinfo").read_text(), re.M) is not None
    except OSError:
        has_amx = False
    return {
        "onednn_limit": limit,
        "mkl_limit": os.environ.get("MKL_ENABLE_INSTRUCTIONS"),
        "aten": torch.backends.cpu.get_cpu_capability(),
        "amx": has_amx and (limit is None or limit in ("ALL", "DEFAULT") or "AMX" in limit),
    }


def describe(facts: dict[str, object]) -> str:
    """Describes :func:`facts` for headings, because AMX makes bfloat16 products several times as fast."""
    limit = f"limited to {facts['onednn_limit']}" if facts["onednn_limit"] else "unlimited"
    return f"PyTorch's products {limit}, {'with' if facts['amx'] else 'without'} AMX"
