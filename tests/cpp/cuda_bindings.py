"""Compiles a CUDA binding for the CPU, with a stand-in for its header cuda_stream.h and a namespace for its ops."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch
from simt import cuda_headers
from torch.utils import cpp_extension

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
_REGISTERED = "STABLE_TORCH_LIBRARY_IMPL(lora_ext, CUDA, m) {"


def load(folder: Path, name: str, stand_in: str, schemas: Iterable[str], namespace: str) -> torch._ops._OpNamespace:
    """Builds csrc/bindings/<name>.cpp in ``folder``, and returns its ops, of ``schemas`` (csrc/schemas.h).

    ``stand_in``: a folder here with cuda_stream.h, and with more sources. ``namespace``: of the ops.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for header in (HERE / stand_in / "cuda_stream.h", HERE / "device_stand_in.h"):
        shutil.copy(header, folder / "csrc/bindings")
    binding = folder / f"csrc/bindings/{name}.cpp"
    defined = "".join(f"  m.def(lora_ext::schemas::{schema}.text);\n" for schema in schemas)
    registered = f"STABLE_TORCH_LIBRARY_IMPL({namespace}, CPU, m) {{"
    on_cpu = f"STABLE_TORCH_LIBRARY({namespace}, m) {{\n{defined}}}\n{registered}"
    text = binding.read_text()
    assert text.count(_REGISTERED) == 1, f"{binding.name} does not register its ops once"
    binding.write_text(text.replace(_REGISTERED, on_cpu))
    includes = [f"-isystem{path}" for path in (*cpp_extension.include_paths(), *cuda_headers.find())]
    sources = [binding, *(HERE / stand_in).glob("*.cpp")]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", "-fvisibility=hidden", f"-I{folder}", *includes]
    command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *sources, "-o", folder / "ops.so"]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    result = subprocess.run([*command, *libraries, "-ltorch_cpu"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    torch.ops.load_library(folder / "ops.so")
    return getattr(torch.ops, namespace)
