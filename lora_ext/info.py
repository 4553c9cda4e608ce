"""Facts about the installation for `lora-ext info`: the binary, the machine, and what runs here."""

from __future__ import annotations

import json as json_module
import platform
import re
from pathlib import Path

import torch

from lora_ext import _load
from lora_ext.export import library_paths

BASE_PRODUCT = {
    "own": "of 33 tokens and more by our kernel, with the adapter in it, where it has the dtypes",
    "library": "of many tokens by PyTorch (oneDNN or MKL)",
}


def cpu_model() -> str:
    """Returns the processor's name from Linux, or its architecture."""
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def gather() -> dict[str, object]:
    """Collects facts about this installation, ready for JSON."""
    built = _load.build_info()
    cuda_loaded = _load.cuda_unavailable_reason == ""
    return {
        "version": built["version"],
        "torch": torch.__version__,
        "torch_built_against": built["torch_built_against"],
        "torch_minimum": built["torch_minimum"],
        "python": platform.python_version(),
        "compiler": built["compiler"],
        "libraries": [str(path) for path in library_paths()],
        "cpu": {
            "model": cpu_model(),
            "isa": _load.cpu_isa(),
            "isas_available": _load.available_cpu_isas(),
            "base_product": _load.base_product(),
            "threads": torch.get_num_threads(),
        },
        "cuda": {
            "kernels_built": bool(built["cuda_archs"]),
            "kernels_loaded": cuda_loaded,
            "reason": _load.cuda_unavailable_reason or None,
            "toolkit": built["cuda_version"] or None,
            "architectures": built["cuda_archs"].split(",") if built["cuda_archs"] else [],
            "ptx": built["cuda_ptx"] or None,
            "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda_loaded else [],
        },
    }


def plan(num_tokens: int, in_features: int, out_features: int, rank: int = 16, sms: int | None = None) -> str:
    """Prints the launches of a layer's forward and backward on CUDA: bfloat16, factors of float32, with dropout.

    ``sms``: streaming multiprocessors of the GPU; None: an H100's. Neither a GPU nor the CUDA kernels are needed.
    """
    gpu = {} if sms is None else {"sms": sms}
    sizes = num_tokens, in_features, [(out_features, rank)]
    forward, backward = _load.plan_forward(*sizes, **gpu), _load.plan_backward(*sizes, **gpu)
    base = "" if forward.streams_weights else "\n  then a cuBLAS GEMM with the frozen weight adds to y"
    return f"{forward}{base}\n\n{backward}\n  then a cuBLAS GEMM with the frozen weight adds to grad_x"


def info(json: bool = False) -> str:
    """Formats :func:`gather` as text, or as JSON."""
    facts = gather()
    if json:
        return json_module.dumps(facts, indent=2)
    cpu, cuda = facts["cpu"], facts["cuda"]
    built = "no"
    if cuda["kernels_built"]:
        newer = f", and newer cards by PTX of compute_{cuda['ptx']}" if cuda["ptx"] else ""
        built = f"yes, for sm_{', sm_'.join(cuda['architectures'])}{newer} (CUDA {cuda['toolkit']})"
    if cuda["kernels_loaded"]:
        in_use = (
            f"yes, on {', '.join(cuda['devices'])}"
            if cuda["devices"]
            else "no: the kernels are loaded, but no GPU is found"
        )
    else:
        in_use = f"no: {cuda['reason']}"
    rows = [
        ("lora_ext", facts["version"]),
        ("torch", f"{facts['torch']} (built against {facts['torch_built_against']}, needs {facts['torch_minimum']})"),
        ("python", facts["python"]),
        ("compiler", facts["compiler"]),
        ("libraries", ", ".join(facts["libraries"])),
        ("CPU", f"{cpu['model']}, {cpu['threads']} threads"),
        ("CPU kernels", f"{cpu['isa']} (this machine runs {', '.join(cpu['isas_available'])})"),
        ("CPU products", BASE_PRODUCT[cpu["base_product"]]),
        ("CUDA built", built),
        ("CUDA in use", in_use),
    ]
    return "\n".join(f"{name:<12} {value}" for name, value in rows)
