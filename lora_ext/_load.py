"""Loads the compiled part, which lora_ext requires: a failure is an ImportError with the remedy."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

_HERE = Path(__file__).resolve().parent
LIBRARY = _HERE / "liblora_ext.so"
CUDA_LIBRARY = _HERE / "liblora_ext_cuda.so"
TORCH_MINIMUM = "2.11"  # setup.py's TORCH_TARGET, for when the library does not load and cannot tell
_REBUILD = "Build it: `make build`, or `pip install .`, in a checkout."


def _reason(error: BaseException) -> str:
    # torch.ops.load_library wraps the loader's message.
    return str(error.__cause__ or error)


def _remedy() -> str:
    """Returns what to do about a missing library: a checkout without a build hides an installed package."""
    checkout = _HERE.parent
    if not ((checkout / "setup.py").is_file() and (checkout / "csrc").is_dir()):
        return _REBUILD
    places = (Path(entry).resolve() / _HERE.name for entry in sys.path)
    installed = next((place for place in places if (place / LIBRARY.name).exists()), None)
    hides = f", or start Python in another folder: it hides the one installed in {installed}" if installed else ""
    return f"This is a checkout without a build: run `make build` in {checkout}{hides}."


def _load_cpu() -> None:
    if not LIBRARY.exists():
        raise ImportError(f"lora_ext: the compiled library {LIBRARY.name} is missing from {_HERE}. {_remedy()}")
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        raise ImportError(
            f"lora_ext: {LIBRARY.name} does not load with torch {torch.__version__} (it needs torch "
            f"{TORCH_MINIMUM} or newer): {_reason(error)}. {_REBUILD}"
        ) from error


def _load_module() -> ModuleType:
    """Returns lora_ext._C (csrc/python.cpp)."""
    try:
        return importlib.import_module("lora_ext._C")
    except ImportError as error:
        if error.name == "lora_ext._C":
            others = ", ".join(sorted(path.name for path in _HERE.glob("_C.*.so")))
            has = f" (it has {others}, of another Python)" if others else ""
            raise ImportError(
                f"lora_ext: the compiled module _C of Python {sys.version_info[0]}.{sys.version_info[1]} is missing "
                f"from {_HERE}{has}. {_remedy()}"
            ) from None
        raise ImportError(f"lora_ext: {_HERE / '_C'} does not load: {error}. {_REBUILD}") from error


def _member(name: str) -> Any:
    """Returns a function of lora_ext._C. ImportError: it was built from other sources."""
    try:
        return getattr(_C, name)
    except AttributeError:
        raise _from_other_sources("the compiled module _C", name) from None


def _load_cuda() -> str:
    """Loads the CUDA kernels if they can run. Returns the reason if not, or ""."""
    if reason := build_info()["no_cuda_reason"]:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{CUDA_LIBRARY.name} does not load: {_reason(error)}"
    return ""


def _check_choices() -> None:
    if not cpu_isa():
        wanted = f"one of {', '.join(available_cpu_isas())} on this machine"
        raise ImportError(
            f"lora_ext: LORA_EXT_CPU_ISA is {os.environ['LORA_EXT_CPU_ISA']!r}, want {wanted}, or unset it"
        )
    if not base_product():
        value = os.environ["LORA_EXT_BASE_PRODUCT"]
        raise ImportError(f"lora_ext: LORA_EXT_BASE_PRODUCT is {value!r}, want own or library, or unset it")


def _from_other_sources(file: str, lacks: str) -> ImportError:
    return ImportError(
        f"lora_ext: {file} in {_HERE} was built from other sources than this Python package: it has no {lacks}. "
        f"{_REBUILD}"
    )


def op_named(name: str) -> torch._ops.OpOverload:
    """Returns an op of the compiled library. ImportError: the library was built from other sources."""
    try:
        return getattr(torch.ops.lora_ext, name).default
    except AttributeError:
        raise _from_other_sources(LIBRARY.name, f"op {name}") from None


def check_kernels_exist(op: str, device: torch.device) -> None:
    """Raises RuntimeError, with the reason, if there are no kernels for tensors on ``device``."""
    if device.type == "cuda" and cuda_unavailable_reason:
        raise RuntimeError(f"{op}: tensors are on {device}, but there are no CUDA kernels: {cuda_unavailable_reason}")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{op}: tensors are on {device}, but there are kernels for cpu and cuda only")


_load_cpu()
_C = _load_module()
build_info = _member("build_info")
dtypes = _member("dtypes")
cpu_isa, available_cpu_isas = _member("cpu_isa"), _member("available_cpu_isas")
few_tokens, base_product = _member("few_tokens"), _member("base_product")
plan_forward, plan_backward, plan_grouped = map(_member, ("plan_forward", "plan_backward", "plan_grouped"))
refusals = _member("refusals")
_check_choices()
cuda_unavailable_reason: str = _load_cuda()
