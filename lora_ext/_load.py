"""Loads the compiled part. Without it there is no lora_ext: a failure here is an ImportError that says what to do."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import torch

_HERE = Path(__file__).resolve().parent
_REBUILD = "Build it with `pip install .` in a checkout, or run `pip install --force-reinstall lora_ext`."


def _reason(error: BaseException) -> str:
    # torch.ops.load_library wraps the loader's message.
    return str(error.__cause__ or error)


def _load_cpu() -> None:
    library = _HERE / "liblora_ext.so"
    if not library.exists():
        raise ImportError(f"lora_ext: the compiled library {library.name} is missing from {_HERE}. {_REBUILD}")
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"lora_ext: {library.name} does not load with torch {torch.__version__} (it needs torch "
            f"{build_info()['torch_minimum']} or newer): {_reason(error)}. {_REBUILD}"
        ) from error


def _load_cuda() -> str:
    """Loads the CUDA kernels where they can run. Returns why not, or "" when they are loaded."""
    library = _HERE / "liblora_ext_cuda.so"
    if reason := build_info()["no_cuda_reason"]:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(library))
    except (OSError, RuntimeError) as error:
        return f"{library.name} does not load: {_reason(error)}"
    return ""


def _check_isa() -> None:
    module = _compiled_module()
    if not module.cpu_isa():
        raise ImportError(
            f"lora_ext: LORA_EXT_CPU_ISA is {os.environ['LORA_EXT_CPU_ISA']!r}, want one of "
            f"{module.available_cpu_isas().replace(',', ', ')} on this machine, or unset it"
        )


def _compiled_module() -> ModuleType:
    try:
        from lora_ext import _C
    except ImportError as error:
        raise ImportError(f"lora_ext: the compiled module lora_ext._C does not load: {error}. {_REBUILD}") from error
    return _C


def build_info() -> dict[str, str]:
    """How the binary was built: version, torch, compiler, CUDA. Strings, empty where they do not apply."""
    return _compiled_module().build_info()


def check_kernels_exist(op: str, device: torch.device) -> None:
    """RuntimeError where there are no kernels for tensors on ``device``, which says why."""
    if device.type == "cuda" and cuda_unavailable_reason:
        raise RuntimeError(f"{op}: tensors are on {device}, but there are no CUDA kernels: {cuda_unavailable_reason}")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{op}: tensors are on {device}, but there are kernels for cpu and cuda only")


_load_cpu()
_check_isa()
cuda_unavailable_reason: str = _load_cuda()
