"""Loads the compiled part, which lora_ext requires: a failure is an ImportError with the remedy."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

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


def _from_other_sources(lacks: str) -> ImportError:
    return ImportError(
        f"lora_ext: {LIBRARY.name} in {_HERE} was built from other sources than this Python package: it has no "
        f"{lacks}. {_REBUILD}"
    )


def _function(name: str) -> ctypes._CFuncPtr:
    """Returns a function of csrc/facts.cpp. ImportError: the library was built from other sources."""
    try:
        return getattr(ctypes.CDLL(str(LIBRARY)), f"lora_ext_{name}")
    except AttributeError:
        raise _from_other_sources(f"lora_ext_{name}") from None


def _fact(name: str) -> str:
    function = _function(name)
    function.restype = ctypes.c_char_p
    return function().decode()


def op_named(name: str) -> torch._ops.OpOverload:
    """Returns an op of the compiled library. ImportError: the library was built from other sources."""
    try:
        return getattr(torch.ops.lora_ext, name).default
    except AttributeError:
        raise _from_other_sources(f"op {name}") from None


def build_info() -> dict[str, str]:
    """Returns how the binary was built: version, torch, compiler, CUDA. Strings, empty where they do not apply."""
    return dict(line.split("\t") for line in _fact("build_info").splitlines())


def cpu_isa() -> str:
    """Returns the name of the instruction set whose CPU kernels run here; "" if LORA_EXT_CPU_ISA names none."""
    return _fact("cpu_isa")


def available_cpu_isas() -> list[str]:
    """Returns the names of the instruction sets that this machine can run, best first."""
    return _fact("available_cpu_isas").split(",")


def base_product() -> str:
    """Returns who multiplies many tokens by a frozen weight on the CPU: "own" (csrc/cpu/base_product.inc) or "library".

    An empty string if LORA_EXT_BASE_PRODUCT says neither.
    """
    return _fact("base_product")


def streams_weight(num_tokens: int, in_features: int, rank: int) -> bool:
    """Returns whether the CUDA kernel for few tokens takes a layer of 16-bit weights (csrc/common/few_tokens.h)."""
    return bool(_function("streams_weight")(*map(ctypes.c_int64, (num_tokens, in_features, rank))))


def refusals() -> dict[str, tuple[str, str]]:
    """Returns the refusals of csrc/refusals.h: name -> (name of the exception, text, in which {} stands for a part)."""
    lines = (line.split("\t") for line in _fact("refusals").splitlines())
    return {name: (error, text) for name, error, text in lines}


def check_kernels_exist(op: str, device: torch.device) -> None:
    """Raises RuntimeError, with the reason, if there are no kernels for tensors on ``device``."""
    if device.type == "cuda" and cuda_unavailable_reason:
        raise RuntimeError(f"{op}: tensors are on {device}, but there are no CUDA kernels: {cuda_unavailable_reason}")
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"{op}: tensors are on {device}, but there are kernels for cpu and cuda only")


_load_cpu()
_check_choices()
cuda_unavailable_reason: str = _load_cuda()
