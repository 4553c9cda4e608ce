"""Builds the compiled part: liblora_ext.so, the module _C and, if nvcc is found, liblora_ext_cuda.so.

The libraries depend on torch's stable ABI and on no Python, the module on no torch: a wheel serves one Python, with
every torch from 2.11 on.

Environment variables:
    LORA_EXT_CUDA        0: never build the CUDA part; 1: fail without it; unset: build it if nvcc is found
    LORA_EXT_CUDA_ARCHS  architectures to build for, for example "90a" or "80,90a,120"
    LORA_EXT_LABEL       1: the version says what was built, as PyTorch's does: 0.2.0+cpu, 0.2.0+cu130
    CUDA_HOME            the CUDA toolkit; default: that of nvcc on PATH, then pip's nvidia-cuda-nvcc
    MAX_JOBS             parallel compiler processes (read by torch)
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = (2, 11)  # the oldest torch that the binary runs with: it uses this version's stable ABI
MIN_NVCC = (12, 8)  # the first with sm_120
CUDA_ARCHS = "80,90a,100,120"  # sm_80 code also runs on sm_86 and sm_89


def virtual_arch(arch: str) -> str:
    """The architecture whose PTX the code for ``arch`` is made from.

    Making PTX takes two thirds of the time. That of sm_80 gives sm_86 and sm_89 the code that they had by themselves,
    and that of sm_100 sm_120; that of sm_90 gave sm_100 a kernel that spills.
    """
    return {"86": "80", "89": "80", "120": "100"}.get(arch, arch)


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(f"csrc/{pattern}"))


def find_cuda_home() -> Path | None:
    nvcc = shutil.which("nvcc")
    candidates = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc:  # can be a wrapper script: ask it for its toolkit
        dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.M)
        candidates.append(Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent)
    candidates += [home for path in sys.path for home in sorted(Path(path or ".").glob("nvidia/cu[0-9]*"))]
    return next((home.resolve() for home in candidates if (home / "bin" / "nvcc").exists()), None)


def choose_cuda() -> tuple[Path | None, str, str]:
    """Returns the toolkit's directory (None: do not build), its version, and the reason for not building."""
    wanted, home, version, reason = os.environ.get("LORA_EXT_CUDA", ""), None, "", ""
    if wanted not in ("", "0", "1"):
        sys.exit(f"LORA_EXT_CUDA is {wanted!r}, want 0, 1 or unset")
    if wanted == "0":
        reason = "LORA_EXT_CUDA=0 when it was built"
    elif (home := find_cuda_home()) is None:
        reason = "no nvcc was found when it was built (CUDA_HOME, PATH, pip's nvidia-cuda-nvcc)"
    else:
        says = subprocess.check_output([home / "bin/nvcc", "--version"], text=True)
        version = re.search(r"release (\d+\.\d+)", says)[1]
        if tuple(map(int, version.split("."))) < MIN_NVCC:
            reason = f"nvcc {version} was found when it was built, want {'.'.join(map(str, MIN_NVCC))} or newer"
        elif torch.version.cuda and torch.version.cuda.split(".")[0] != version.split(".")[0]:
            reason = f"nvcc {version} was found when it was built, but that torch was for CUDA {torch.version.cuda}"
    if reason and wanted == "1":
        sys.exit(f"LORA_EXT_CUDA=1, but the CUDA part cannot be built: {reason}")
    return (None if reason else home), version, reason


HEADERS = sources("**/*.h", "**/*.cuh", "**/*.inc")
CUDA_HOME, NVCC_VERSION, NO_CUDA_REASON = choose_cuda()
LABEL = f"+cu{NVCC_VERSION.replace('.', '')}" if CUDA_HOME else "+cpu"
LABEL = LABEL if os.environ.get("LORA_EXT_LABEL") == "1" else ""
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M)[1] + LABEL
ARCHS = re.split(r"[,; ]+", os.environ.get("LORA_EXT_CUDA_ARCHS") or CUDA_ARCHS)
# PTX of the oldest one, which the driver compiles for cards that are newer than all of them. That of 90a fits no other.
PTX_ARCH = str(min(map(int, filter(str.isdigit, ARCHS)), default=""))

TORCH_FLAGS = [f"-isystem{path}" for path in cpp_extension.include_paths()]  # -isystem silences their warnings
TORCH_FLAGS += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET[0] << 56 | TORCH_TARGET[1] << 48:#018x}"]
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-Wall", "-Wextra", "-fvisibility=hidden", "-ffp-contract=fast"]
CXX_FLAGS += ["-fno-math-errno", f"-ffile-prefix-map={ROOT}/="]  # error messages carry no build paths
LINK_FLAGS = [f"-Wl,--version-script={ROOT / 'csrc/exports.map'}", "-ldl"]
COMMON = {"depends": HEADERS, "language": "c++", "library_dirs": cpp_extension.library_paths()}
FACTS = {
    "version": VERSION,
    "torch_built_against": torch.__version__,
    "torch_minimum": ".".join(map(str, TORCH_TARGET)),
    "cuda_version": NVCC_VERSION if CUDA_HOME else "",
    "cuda_archs": ",".join(ARCHS) if CUDA_HOME else "",
    "cuda_ptx": PTX_ARCH if CUDA_HOME else "",
    "no_cuda_reason": NO_CUDA_REASON,
}

extensions = [
    Extension(
        "lora_ext.liblora_ext",
        sources("library.cpp", "older_systems.cpp", "bindings/cpu_*.cpp", "cpu/*.cpp"),
        extra_compile_args={"cxx": [*CXX_FLAGS, *TORCH_FLAGS]},
        extra_link_args=[*LINK_FLAGS, "-ltorch_cpu", "-Wl,-z,defs"],
        **COMMON,
    ),
    Extension(
        "lora_ext._C",
        sources("python.cpp", "older_systems.cpp", "cuda/*.cpp"),
        depends=HEADERS,
        language="c++",
        extra_compile_args={"cxx": [*CXX_FLAGS, f"-isystem{pybind11.get_include()}"]},
        extra_link_args=LINK_FLAGS,
    ),
]
if CUDA_HOME:
    cpp_extension.CUDA_HOME = str(CUDA_HOME)  # torch's CPU build sets None
    gencode = [f"-gencode=arch=compute_{virtual_arch(arch)},code=sm_{arch}" for arch in ARCHS]
    gencode += [f"-gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}"] if PTX_ARCH else []
    cuda_extension = Extension(
        "lora_ext.liblora_ext_cuda",
        sources("older_systems.cpp", "bindings/cuda_*.cpp", "cuda/*.cpp", "cuda/**/*.cu"),
        include_dirs=[str(CUDA_HOME / "include")],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *TORCH_FLAGS, "-DUSE_CUDA"],
            "nvcc": ["-std=c++20", "-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden,-Wall", *gencode],
        },
        # libtorch.so needs libtorch_cuda.so in CUDA builds of torch, and exists in every build.
        extra_link_args=[*LINK_FLAGS, "-Wl,--push-state,--no-as-needed", "-ltorch", "-Wl,--pop-state", "-ltorch_cpu"]
        + [f"-L{CUDA_HOME}/lib64", f"-L{CUDA_HOME}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"],
        **COMMON,
    )
    extensions.append(cuda_extension)


def write_facts() -> None:
    """Writes build/facts.h for csrc/python.cpp, if it changed."""
    pairs = "".join(f"{{{json.dumps(name)}, {json.dumps(fact)}}}, " for name, fact in FACTS.items())
    text, header = f"#define LORA_EXT_BUILD_INFO {pairs}\n", ROOT / "build" / "facts.h"
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(exist_ok=True)
        header.write_text(text)


class BuildExtension(cpp_extension.BuildExtension):
    def finalize_options(self):
        super().finalize_options()
        # Keeps the objects of editable installs, which build in a temporary folder, so that builds are incremental.
        self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")

    def get_ext_filename(self, name):
        if name.rpartition(".")[2].startswith(
            "lib"
        ):  # without the Python ABI that extension modules have in their names
            return name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(name)

    def build_extensions(self):
        if any(extension.name == "lora_ext._C" for extension in self.extensions):
            write_facts()
        # nvcc writes no dependency file for ninja: rebuild each CUDA object that is older than one it may include.
        included = [header for header in HEADERS if not header.startswith(("csrc/cpu/", "csrc/bindings/"))]
        newest = max(os.path.getmtime(ROOT / header) for header in included)
        for path in Path(self.build_temp).rglob("cuda/**/*.o"):
            if path.stat().st_mtime < newest:
                path.unlink()
        super().build_extensions()
        for folder in (ROOT, Path(self.build_lib)):  # an older build's files must not outlive it
            (folder / "lora_ext/_C.abi3.so").unlink(missing_ok=True)
            if not CUDA_HOME:
                (folder / "lora_ext/liblora_ext_cuda.so").unlink(missing_ok=True)
        ptx = f" and PTX of {PTX_ARCH}" if PTX_ARCH else ""
        cuda = f"CUDA {NVCC_VERSION} for {','.join(ARCHS)}{ptx}" if CUDA_HOME else f"without CUDA: {NO_CUDA_REASON}"
        print(f"lora_ext {VERSION}: built against torch {torch.__version__}, {cuda}")


class BuildCuda(BuildExtension):  # for `make cuda`: the CUDA library alone, next to the development build
    def finalize_options(self):
        super().finalize_options()
        self.build_lib, self.build_temp = str(ROOT / "build/cuda"), str(ROOT / "build/cuda/objects")
        self.extensions = [extension for extension in self.extensions if extension.name.endswith("_cuda")]


options = {"egg_info": {"tag_build": LABEL}}
setup(ext_modules=extensions, options=options, cmdclass={"build_ext": BuildExtension, "build_cuda": BuildCuda})
