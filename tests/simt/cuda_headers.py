"""Finds CUDA's headers: the stand-in uses their types and their conversions of 16-bit floats."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

NEEDED = ["cuda_runtime_api.h", "crt/host_defines.h", "vector_types.h", "cuda_bf16.h", "cuda_fp16.h", "nv/target"]
PACKAGES = "nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl"


def _candidates() -> Iterator[list[Path]]:
    """Yields groups of folders that together may have all headers."""
    if os.environ.get("CUDA_HOME"):
        home = Path(os.environ["CUDA_HOME"])
        yield [home / "include", home / "include/cccl"]
    for path in sys.path:
        for home in sorted(Path(path or ".").glob("nvidia/cu[0-9]*"), reverse=True):
            yield [home / "include", home / "include/cccl"]
        parts = ["cuda_runtime", "cuda_nvcc", "cuda_cccl"]  # CUDA 12's packages have separate folders
        yield [Path(path or ".") / "nvidia" / part / "include" for part in parts]
    for nvcc in filter(None, [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]):
        home = Path(nvcc).resolve().parent.parent
        yield [home / "include", home / "include/cccl"]


def find() -> list[Path]:
    """Returns the include folders. Raises RuntimeError with the packages to install if there are none."""
    for folders in _candidates():
        if all(any((folder / header).exists() for folder in folders) for header in NEEDED):
            return [folder for folder in folders if folder.is_dir()]
    raise RuntimeError(
        "tests/simt needs CUDA's headers (no compiler, no GPU) and found none in CUDA_HOME, site-packages or next to "
        f"nvcc: pip install {PACKAGES}, or pip install 'lora_ext[test]'"
    )
