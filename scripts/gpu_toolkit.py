"""Finds what a GPU check needs: a CUDA toolkit, compute-sanitizer, Python packages, or a library built before."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

from timed_parts import ROOT

PACKAGE = ROOT / "lora_ext"
LIBRARIES = ("liblora_ext.so", "liblora_ext_cuda.so", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
MIN_NVCC = (12, 8)  # setup.py's

# What pip installs, by what is looked for. A program next to the interpreter counts as found.
TO_RUN = {"torch": "torch>=2.11", "safetensors": "safetensors[torch]>=0.6.1", "regex": "regex>=2025.10.22"}
TO_BUILD = {"setuptools": "setuptools>=77", "ninja": "ninja>=1.11", "numpy": "numpy", "pybind11": "pybind11>=2.13"}
TO_TEST = {"pytest": "pytest>=8", "xdist": "pytest-xdist>=3.5"}


# --- what is missing --------------------------------------------------------------------------------------------------


def find_program(name: str) -> str | None:
    """Finds a program next to the interpreter, or on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def release(version: str) -> tuple[int, ...]:
    """Returns the numbers at the beginning of a version: ``(2, 11, 0)`` of "2.11.0+cu130"."""
    return tuple(map(int, re.match(r"\d+(?:\.\d+)*", version)[0].split(".")))


def why_not(name: str, requirement: str) -> str:
    """Returns "<name> is missing" or "<name> <version> is too old"; "" if it is there."""
    if name == "ninja":  # a program, which need not be pip's
        return "" if find_program(name) else f"{name} is missing"
    if not importlib.util.find_spec(name):
        return f"{name} is missing"
    least = re.search(r">=([\d.]+)", requirement)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a source tree
        return ""
    return f"{name} {version} is too old" if least and release(version) < release(least[1]) else ""


def missing_packages(builds: bool) -> dict[str, str]:
    """Returns what has to be installed before anything else: requirements by what is wrong. builds: a library is to be
    built.
    """
    wanted = TO_RUN | TO_TEST | (TO_BUILD if builds else {})
    return {reason: requirement for name, requirement in wanted.items() if (reason := why_not(name, requirement))}


def missing_compiler() -> str:
    """Returns what to do about a missing C++ compiler, or ""."""
    name = os.environ.get("CXX", "c++")
    if find_program(name.split()[0]):
        return ""
    return f"no C++ compiler ({name}): install g++ 11 or newer, or set CXX; on Debian: apt-get install g++"


# --- toolkits ---------------------------------------------------------------------------------------------------------


def nvcc_says(home: Path) -> str:
    """Returns what a toolkit's nvcc prints about its version; "" if it does not run."""
    try:
        return subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ""


def find_cuda_home(torch_cuda: str, candidates: list[Path]) -> Path | None:
    """Finds the first toolkit of torch's CUDA version, else of its major version, that is new enough to build.

    candidates: best first.
    """

    def version(home: Path) -> str:
        match = re.search(r"release (\d+\.\d+)", nvcc_says(home))
        return match[1] if match else ""

    versions = {home: version(home) for home in candidates}
    major = torch_cuda.partition(".")[0] + "."
    for fits in (lambda found: found == torch_cuda, lambda found: found.startswith(major)):
        for home, found in versions.items():
            if found and release(found) >= MIN_NVCC and fits(found):
                return home
    return None


def cuda_home_candidates() -> list[Path]:
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):  # can be a wrapper script: ask it for its toolkit
        dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes += [Path(top[1].strip()).resolve()] if (top := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.M)) else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    homes += [home.resolve() for path in sys.path for home in sorted(Path(path or ".").glob("nvidia/cu[0-9]*"))]
    return homes


def first_home(candidates: list[Path]) -> Path | None:
    """Returns the first toolkit that has an nvcc."""
    return next((home for home in candidates if (home / "bin" / "nvcc").exists()), None)


def library_flags(home: Path) -> list[str]:
    """Returns nvcc's options for the toolkit's libraries: nvcc looks in lib64, which toolkits from pip do not have."""
    return [f"-L{folder}" for folder in (home / "lib64", home / "lib") if folder.is_dir()]


def find_sanitizer(home: Path | None) -> str | None:
    places = [home / "bin", home / "compute-sanitizer"] if home else []
    found = shutil.which("compute-sanitizer")
    return found or next((str(p / "compute-sanitizer") for p in places if (p / "compute-sanitizer").exists()), None)


# --- a library that was built before ----------------------------------------------------------------------------------


def runs_on(archs: str, ptx: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("80,90a"), or PTX ("80"; "": none), runs on a card."""
    major, minor = capability
    for arch in filter(None, archs.split(",")):
        if arch.isdigit():
            if int(arch[:-1]) == major and int(arch[-1]) <= minor:
                return True
        elif arch.rstrip("af") == f"{major}{minor}":
            return True
    return bool(ptx) and int(ptx) <= 10 * major + minor


def install_library(source: Path) -> None:
    """Puts the compiled libraries into the package: from a wheel of this Python, from a folder, or from next to one.

    Raises:
        SystemExit: one of them is missing.
    """
    if source.suffix == ".whl" and source.is_file():
        with zipfile.ZipFile(source) as wheel:
            found = {name: f"lora_ext/{name}" for name in LIBRARIES if f"lora_ext/{name}" in wheel.namelist()}
            contents = {name: wheel.read(entry) for name, entry in found.items()}
    else:
        folder = source if source.is_dir() else source.parent
        places = [folder / "lora_ext", folder]
        files = {name: next((p / name for p in places if (p / name).is_file()), None) for name in LIBRARIES}
        contents = {name: path.read_bytes() for name, path in files.items() if path}
    if absent := [name for name in LIBRARIES if name not in contents]:
        sys.exit(
            f"gpu_check: --library {source}: no {' and no '.join(absent)}; want a wheel of this Python, or a folder with all of them"
        )
    for name, data in contents.items():
        target = PACKAGE / name
        if not target.exists() or target.read_bytes() != data:
            part = target.with_suffix(".part")
            part.write_bytes(data)
            part.replace(target)  # a process may have the old one open


def check_library() -> int:
    """Prints what the libraries in the package were built for; returns 1 if they do not run on this machine's card."""
    import torch

    sys.path.insert(0, str(ROOT))
    from lora_ext import _load

    info, capability = _load.build_info(), torch.cuda.get_device_capability()
    archs, ptx = info["cuda_archs"], info.get("cuda_ptx", "")
    built = f"sm_{archs.replace(',', ', sm_')}" + (f", PTX of compute_{ptx}" if ptx else "")
    print(f"lora_ext {info['version']}, CUDA {info['cuda_version']} for {built}, torch {info['torch_built_against']}")
    if reason := _load.cuda_unavailable_reason:
        print(f"the CUDA kernels do not load: {reason}")
        return 1
    if not runs_on(archs, ptx, capability):
        print(f"built for {built}, which this card (sm_{capability[0]}{capability[1]}) does not run")
        return 1
    return 0


# --- the primitives' known answers ------------------------------------------------------------------------------------


def golden_command(home: Path, arch: str, target: Path) -> list[str]:
    """Returns the command that compiles tests/simt/golden.cu."""
    command = [f"{home}/bin/nvcc", "-shared", "-std=c++20", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", *library_flags(home)]
    return [*command, "-o", str(target), str(ROOT / "tests" / "simt" / "golden.cu")]


def golden(home: Path, arch: str, target: Path, only_compile: bool = False) -> int:
    """Runs tests/simt/golden.cu on the GPU: do the PTX instructions behave like their CPU stand-in?"""
    subprocess.run(golden_command(home, arch, target), check=True)
    if only_compile:
        print(f"compiled for sm_{arch} and linked, not run")
        return 0
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from simt.golden import PRIMITIVES

    run_primitive = ctypes.CDLL(str(target)).golden
    run_primitive.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    wrong = 0
    for number, (name, make) in enumerate(PRIMITIVES.items()):
        inputs, expected = make()
        source_tensor, result = inputs.cuda(), torch.zeros_like(expected, device="cuda")
        torch.cuda.synchronize()
        error = run_primitive(number, source_tensor.data_ptr(), result.data_ptr(), None)
        torch.cuda.synchronize()
        # -1 stands for any word.
        known = expected != -1 if name == "atomics" else torch.ones_like(expected, dtype=torch.bool)
        good = error == 0 and torch.equal(result.cpu()[known], expected[known])
        wrong += not good
        print(f"{name}: {'as documented' if good else f'WRONG (error {error})'}")
    print(f"{len(PRIMITIVES) - wrong} passed, {wrong} failed")
    return 1 if wrong else 0
