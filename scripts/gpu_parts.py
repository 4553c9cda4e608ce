"""The parts of a GPU check, in their order: what is most likely to find something first."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from gpu_toolkit import LIBRARIES, MIN_NVCC, PACKAGE, find_sanitizer
from timed_parts import LOGS, ROOT, Part

SANITIZER_S = 40  # for the ops
SANITIZER_IMPORT_S = 60  # compute-sanitizer slows torch's import, too; allowed in addition


def arch_of(capability: tuple[int, int]) -> str:
    """Returns nvcc's name of the architecture to build for."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def large_files() -> list[str]:
    """Returns the test files with tests that want gigabytes (the mark large)."""
    found = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.large" in path.read_text()]
    return [str(path.relative_to(ROOT)) for path in found]


def library_is_there() -> bool:
    return all((PACKAGE / name).exists() for name in LIBRARIES)


def library_part(facts: dict[str, str], home: Path | None, library: Path | None, cores: int) -> Part:
    """The first part: builds the library for this card, or installs or checks one that was built before."""
    python = sys.executable
    if library or (home is None and library_is_there()):
        command = [python, "scripts/gpu_check.py", "--check-library", *([str(library)] if library else [])]
        return Part("library", command, 60, 15)
    arguments = {"LORA_EXT_CUDA": "1", "LORA_EXT_CUDA_ARCHS": facts["arch"], "CUDA_HOME": str(home or "")}
    least = ".".join(map(str, MIN_NVCC))
    no_toolkit = f"no CUDA toolkit of {least} or newer for torch's CUDA {facts['cuda']}: set CUDA_HOME, or give a wheel"
    no_toolkit += " by --library"
    command = [python, "setup.py", "build_ext", "--inplace"]
    return Part("build", command, 200, 60, arguments | {"MAX_JOBS": str(cores)}, "" if home else no_toolkit)


def list_parts(facts: dict[str, str], home: Path | None, cores: int, library: Path | None = None) -> list[Part]:
    """facts: those of gpu_check.gather_facts. home: the toolkit. library: the option of that name."""
    python = sys.executable
    sanitizer = find_sanitizer(home)
    first = library_part(facts, home, library, cores)
    needs = (first.name,)

    def pytest(name: str, limit_s: float, least_s: float, *arguments: str, parallel: bool = True) -> Part:
        # -v: a line for every test at once, so that a run that has to be killed has told what failed.
        command = [python, "-m", "pytest", "--device", "cuda", "-v", "-p", "no:cacheprovider", "--tb=short"]
        command += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=120", *arguments]
        # Also one at a time in a process of its own: after a stray access another one runs the tests that are left.
        command += ["-n", str(min(8, cores) if parallel else 1)]
        return Part(name, command, limit_s, least_s, {"OMP_WAIT_POLICY": "passive"}, needs=needs)

    def sanitize(tool: str, **environment: str) -> Part:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=lora_ext"]
        # Failed calls of CUDA's host functions are no findings: libraries probe what a driver has. Ours are checked.
        command += ["--report-api-errors", "no", "--error-exitcode", "99"]
        command += [python, "scripts/sanitize_ops.py", "--seconds", str(SANITIZER_S)]
        reason = "" if sanitizer else "compute-sanitizer is not installed"
        limit = SANITIZER_S + SANITIZER_IMPORT_S
        return Part(tool, command, limit, 30, environment, reason, needs, sanitizer=True, optional=True)

    def bench(script: str, seconds: int, least_s: float, *arguments: str, name: str = "", optional=False) -> Part:
        name = name or script
        command = [python, f"benchmarks/bench_{script}.py", "--json", str(LOGS / f"{name}.json")]
        command += ["--seconds", str(seconds), *arguments]
        return Part(name, command, seconds + 30, least_s, needs=needs, measures=f"{name}.json", optional=optional)

    on_gpu = ("--device", "cuda")
    no_nvcc = "" if home else "no nvcc, which compiles tests/simt/golden.cu"
    golden = [python, "scripts/gpu_check.py", "--golden", str(home), facts["arch"]]
    return [
        first,
        # A check of the stand-in: without nvcc, a library that was built before is checked all the same.
        Part("golden", golden, 40, 15, not_run=no_nvcc, optional=first.name == "library"),
        Part("small", [python, "scripts/sanitize_ops.py"], 30, 10, needs=needs),
        pytest("ops", 150, 50, "tests/ops", "-m", "not large"),
        pytest("large", 60, 15, *large_files(), "-m", "large", parallel=False),
        bench("kernels", 45, 40),
        bench("layer", 60, 40, *on_gpu),
        bench("siblings", 20, 15, *on_gpu),
        bench("host", 10, 10, *on_gpu),
        bench("grouped", 25, 15, *on_gpu, "--adapters", "64"),
        # Without the caching allocator's pools, every tensor has its own bounds.
        sanitize("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitize("racecheck"),
        pytest("tests", 180, 40, "tests", "--ignore=tests/ops", "-m", "not large"),
        bench("layer", 30, 15, *on_gpu, "--rivals", name="rivals", optional=True),
    ]


def list_dry_parts(facts: dict[str, str], home: Path | None) -> list[Part]:
    """Lists the parts that run without a GPU: compiling, collecting the tests, and the benchmarks on the CPU."""
    python = sys.executable

    def bench(script: str, *arguments: str, name: str = "", shapes: str = "") -> Part:
        name = name or script
        command = [python, f"benchmarks/bench_{script}.py", "--json", str(LOGS / f"{name}.json"), "--rounds", "2"]
        command += [*(("--shapes", shapes) if shapes else ()), *arguments]
        return Part(name, command, 200, 30, measures=f"{name}.json")

    golden = [python, "scripts/gpu_check.py", "--golden", str(home), facts["arch"], "--dry"]
    collect = [python, "-m", "pytest", "-p", "support.gpu_machine", "-p", "no:cacheprovider", "-q", "--collect-only"]
    return [
        Part("golden", golden, 200, 30, not_run="" if home else "no nvcc", optional=True),
        Part("collect", collect, 300, 30, {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}),
        bench("layer", "--no-compile", shapes="8x16x24"),
        bench("siblings", shapes="8x16x24+8"),
        bench("host"),
        bench("grouped", "--only", "forward", shapes="4x16x24"),
        bench("layer", "--rivals", name="rivals", shapes="8x16x24"),
    ]


def chosen(parts: list[Part], only: str) -> list[Part]:
    """Returns the parts named in ``--only``. SystemExit: there is no such part."""
    wanted = set(filter(None, re.split(r"[,\s]+", only)))
    names = [part.name for part in parts]
    if unknown := wanted - set(names):
        sys.exit(f"gpu_check: no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [part for part in parts if part.name in wanted]
