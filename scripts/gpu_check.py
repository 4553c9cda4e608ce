"""Builds, tests and measures lora_ext on the GPU of this machine; see gpu_check.sh.

    python scripts/gpu_check.py [--seconds 465] [--only ops,layer] [--continue] [--library WHEEL] [--results DIR]

Each part is a process with a time limit. At its limit it is interrupted, prints what it found, and keeps what it
measured. Each part writes its entry of benchmarks/results/<card>/gpu_check.json as soon as it ends: run the rest later
with --only or --continue. Prints the tables at the end, measured figures next to predicted ones, and keeps each part's
output in build/gpu_check/.

--dry runs what needs no GPU, for the arch of --arch: does it compile, do the benchmarks run?

Exit status 0: every part passed, except optional ones that cannot run here (compute-sanitizer, rivals), and sanitizers
that found nothing in their time.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import gpu_report
from gpu_report import ROOT

LOGS = ROOT / "build" / "gpu_check"
LIBRARIES = ("liblora_ext.so", "liblora_ext_cuda.so", f"_C{sysconfig.get_config_var('EXT_SUFFIX')}")
NEEDED = {"safetensors": "safetensors[torch]", "xdist": "pytest-xdist"} | {
    name: name for name in ("regex", "pytest", "pybind11")
}
SANITIZER_S = 40  # for the ops; compute-sanitizer slows torch's import, too, which is allowed in addition
STOPPED_IN_TIME = 75  # exit status of scripts/sanitize_ops.py that its own time budget ended
TIMED_OUT = (124, 137)  # of timeout(1): interrupted, killed
PASSED, FAILED, OUT_OF_TIME, NOT_RUN = "passed", "failed", "out of time", "not run"
NOT_FINISHED = "not finished"  # a sanitizer that found nothing in its time


@dataclass
class Part:
    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str = ""  # why it cannot run here
    measures: bool = False  # writes its figures to LOGS as soon as it has them
    sanitizer: bool = False
    optional: bool = False  # the check passes without it


# --- what there is on this machine ------------------------------------------------------------------------------------


def find_cuda_home() -> Path | None:
    """Finds the toolkit as setup.py does: CUDA_HOME, nvcc on PATH, pip's."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):  # can be a wrapper script: ask it for its toolkit
        dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        top = re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.M)
        homes.append(Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent)
    homes += [home for path in sys.path for home in sorted(Path(path or ".").glob("nvidia/cu[0-9]*"))]
    return next((home.resolve() for home in [*homes, Path("/usr/local/cuda")] if (home / "bin/nvcc").exists()), None)


def arch_of(capability: tuple[int, int]) -> str:
    """Returns nvcc's name of the architecture to build for."""
    return "{}{}".format(*capability) + ("a" if capability == (9, 0) else "")


def gather_facts(dry_arch: str = "") -> dict[str, str]:
    """``dry_arch``: the architecture to compile for where no GPU is used. SystemExit: there is no GPU."""
    import torch

    if not dry_arch and not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} finds no GPU; --dry runs what needs none")

    def says(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    changed = "+changes" if says("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "card": "no GPU (--dry)" if dry_arch else torch.cuda.get_device_name(),
        "arch": dry_arch or arch_of(torch.cuda.get_device_capability()),
        "driver": says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "commit": (says("git", "rev-parse", "HEAD") or "unknown") + changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def install_library(wheel: Path, package: Path = ROOT / "lora_ext") -> None:
    """Puts the compiled libraries of a wheel of this Python into the package. SystemExit: the wheel lacks one."""
    with zipfile.ZipFile(wheel) as archive:
        entries = {Path(entry).name: entry for entry in archive.namelist() if entry.endswith(".so")}
        if missing := [name for name in LIBRARIES if name not in entries]:
            sys.exit(f"gpu_check: --library {wheel}: no {' and no '.join(missing)}")
        for name, entry in entries.items():
            part = package / f"{name}.part"
            part.write_bytes(archive.read(entry))
            part.replace(package / name)  # a process may have the old one open


# --- the parts: what is most likely to find something first -----------------------------------------------------------


def list_parts(facts: dict[str, str], home: Path | None, cores: int) -> list[Part]:
    """Lists the parts of a check; the others need the first. ``home``: the toolkit."""
    python = sys.executable
    is_built = all((ROOT / "lora_ext" / name).exists() for name in LIBRARIES)
    build = {"LORA_EXT_CUDA": "1", "LORA_EXT_CUDA_ARCHS": facts["arch"], "MAX_JOBS": str(cores)}
    if home:
        build["CUDA_HOME"] = str(home)
    sanitizer = shutil.which("compute-sanitizer") or (home and shutil.which("compute-sanitizer", path=home / "bin"))

    def pytest(name: str, limit_s: float, *arguments: str, jobs: int = min(8, cores)) -> Part:
        # -v: a line for every test at once, so that a run that has to be killed has told what failed.
        command = [python, "-m", "pytest", "--device", "cuda", "-v", "-p", "no:cacheprovider", "--tb=short"]
        command += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=120", *arguments, "-n", str(jobs)]
        return Part(name, command, limit_s, {"OMP_WAIT_POLICY": "passive"})

    def sanitize(tool: str, **environment: str) -> Part:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=lora_ext"]
        # Failed calls of CUDA's host functions are no findings: libraries probe what a driver has. Ours are checked.
        command += ["--report-api-errors", "no", "--error-exitcode", "99"]
        command += [python, "scripts/sanitize_ops.py", "--seconds", str(SANITIZER_S)]
        reason = "" if sanitizer else "compute-sanitizer is not installed"
        return Part(tool, command, SANITIZER_S + 60, environment, reason, sanitizer=True, optional=True)

    def bench(script: str, seconds: int, *arguments: str, name: str = "", optional: bool = False) -> Part:
        name = name or script
        command = [python, f"benchmarks/bench_{script}.py", "--json", str(LOGS / f"{name}.json")]
        command += ["--seconds", str(seconds), *arguments]
        return Part(name, command, seconds + 30, measures=True, optional=optional)

    on_gpu = ("--device", "cuda")
    large = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.large" in path.read_text()]
    if home or not is_built:  # setup.py says what is missing
        first = Part("build", [python, "setup.py", "build_ext", "--inplace"], 200, build)
    else:
        first = Part("library", [python, "-m", "lora_ext", "info"], 60)
    golden = [python, "scripts/gpu_check.py", "--golden", str(home), facts["arch"]]
    return [
        first,
        # A check of the stand-in: without nvcc, a library that was built before is checked all the same.
        Part(
            "golden", golden, 40, not_run="" if home else "no nvcc, which compiles tests/simt/golden.cu", optional=True
        ),
        Part("small", [python, "scripts/sanitize_ops.py"], 30),
        pytest("ops", 150, "tests/ops", "-m", "not large"),
        pytest("large", 60, *(str(path.relative_to(ROOT)) for path in large), "-m", "large", jobs=1),
        bench("kernels", 45),
        bench("layer", 60, *on_gpu),
        bench("siblings", 20, *on_gpu),
        bench("host", 10, *on_gpu),
        bench("grouped", 25, *on_gpu, "--adapters", "64"),
        # Without the caching allocator's pools, every tensor has its own bounds.
        sanitize("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitize("racecheck"),
        pytest("tests", 180, "tests", "--ignore=tests/ops", "-m", "not large"),
        bench("layer", 30, *on_gpu, "--rivals", name="rivals", optional=True),
    ]


def list_dry_parts(facts: dict[str, str], home: Path | None) -> list[Part]:
    """Lists the parts that run without a GPU: compiling, and the benchmarks on the CPU."""
    python = sys.executable

    def bench(script: str, *arguments: str, name: str = "") -> Part:
        name = name or script
        command = [python, f"benchmarks/bench_{script}.py", "--json", str(LOGS / f"{name}.json"), "--rounds", "2"]
        return Part(name, [*command, *arguments], 200, measures=True)

    golden = [python, "scripts/gpu_check.py", "--golden", str(home), facts["arch"], "--dry"]
    return [
        Part("golden", golden, 200, not_run="" if home else "no nvcc", optional=True),
        bench("layer", "--no-compile", "--shapes", "8x16x24"),
        bench("siblings", "--shapes", "8x16x24+8"),
        bench("host"),
        bench("grouped", "--only", "forward", "--shapes", "4x16x24"),
        bench("layer", "--rivals", "--shapes", "8x16x24", name="rivals"),
    ]


def golden(home: Path, arch: str, only_compile: bool = False) -> int:
    """Runs tests/simt/golden.cu on the GPU: do the PTX instructions behave like their CPU stand-in?"""
    target = LOGS / "golden.so"
    command = [f"{home}/bin/nvcc", "-shared", "-std=c++20", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"]
    # nvcc looks for the runtime in lib64 by itself; a toolkit from pip has lib only.
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", f"-L{home}/lib64", f"-L{home}/lib", "-o", str(target)]
    subprocess.run([*command, str(ROOT / "tests" / "simt" / "golden.cu")], check=True)
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
        source, result = inputs.cuda(), torch.zeros_like(expected, device="cuda")
        torch.cuda.synchronize()
        error = run_primitive(number, source.data_ptr(), result.data_ptr(), None)
        torch.cuda.synchronize()
        good = error == 0 and torch.equal(result.cpu(), expected)
        wrong += not good
        print(f"{name}: {'as documented' if good else f'WRONG (error {error})'}")
    print(f"{len(PRIMITIVES) - wrong} passed, {wrong} failed")
    return 1 if wrong else 0


# --- running a part ---------------------------------------------------------------------------------------------------


def run(part: Part, limit_s: float) -> dict[str, Any]:
    """Runs a part; returns its entry of the result file.

    KeyboardInterrupt: its processes were ended first; the exception's argument is the entry.
    """
    shown = " ".join("python" if w == sys.executable else w.replace(f"{ROOT}/", "") for w in part.command)
    entry = {"status": NOT_RUN, "seconds": 0.0, "command": shown, "detail": part.not_run, "failures": []}
    if part.not_run or limit_s < 5:
        return entry | {"detail": part.not_run or "no time left; --continue runs it"}
    log, figures = LOGS / f"{part.name}.log", LOGS / f"{part.name}.json"
    figures.unlink(missing_ok=True)
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # ninja comes with pip next to the interpreter, which need not be on PATH.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PYTHONPATH": search_path, "PATH": programs, "PYTHONUNBUFFERED": "1"}
    # pytest prints its summary after SIGINT.
    command = ["timeout", "--signal=INT", "--kill-after=20", str(int(limit_s)), *part.command]
    begin, stopped = time.monotonic(), False
    with log.open("w") as output:
        how = {"cwd": ROOT, "env": environment | part.environment, "start_new_session": True}
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **how)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            stopped = True
            process.send_signal(signal.SIGINT)  # timeout passes it on
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            code = TIMED_OUT[0]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # children that outlived it would keep the GPU
    text = log.read_text(errors="replace")
    entry |= {"status": status_of(part, code, text), "seconds": time.monotonic() - begin, "detail": telling_line(text)}
    entry |= {"failures": failed_tests(text)}
    if part.measures:
        entry["measured"] = gpu_report.read_json(figures)
    if stopped:
        raise KeyboardInterrupt(entry | {"status": "interrupted"})
    return entry


def status_of(part: Part, code: int, text: str) -> str:
    if part.sanitizer and "Device not supported" in text:  # a machine that hides the debugging interface
        return NOT_RUN
    if part.sanitizer and code in (STOPPED_IN_TIME, *TIMED_OUT):
        return FAILED if sanitizer_errors(text) else NOT_FINISHED
    return OUT_OF_TIME if code in TIMED_OUT else FAILED if code else PASSED


def sanitizer_errors(text: str) -> bool:
    """Whether compute-sanitizer reported something."""
    report = r"^=+ (Invalid|Error:|Warning: Race|Race|Misaligned|Uninitialized|Barrier error|Program hit|Leaked)"
    return bool(re.search(report, text, re.M) or re.search(r"SUMMARY: [1-9]", text) or ", WRONG" in text)


def failed_tests(text: str) -> list[str]:
    """Returns the tests that pytest -v called failed, even if it did not come to its summary."""
    patterns = (
        r"^(?:\[gw\d+\] \[ *\d+%\] )?(?:FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - .*)?$",  # xdist, the summary
        r"^(\S+\.py::.+?) (?:FAILED|ERROR) +\[ *\d+%\]$",
    )
    found = (match[1].strip() for pattern in patterns for match in re.finditer(pattern, text, re.M))
    return list(dict.fromkeys(found))


def telling_line(text: str) -> str:
    """Returns the line that says how a part went: pytest's or the sanitizer's summary, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    summary = r"ERROR SUMMARY|RACECHECK SUMMARY|\d+ passed|\d+ failed|tests collected|not finished"
    return ([line for line in lines if re.search(summary, line)] or lines or [""])[-1].strip("= ")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=465.0, help="for all parts together")
    parser.add_argument("--only", default="", help="these parts, separated by commas")
    parser.add_argument(
        "--continue", dest="resume", action="store_true", help="only what has not passed at this commit"
    )
    parser.add_argument("--library", type=Path, help="a wheel with the libraries, instead of building (needs no nvcc)")
    parser.add_argument("--dry", action="store_true", help="only what needs no GPU")
    parser.add_argument("--arch", default="90a", help="architecture to compile for with --dry")
    parser.add_argument("--results", type=Path, help="folder of gpu_check.json; the card's in benchmarks/results")
    parser.add_argument("--golden", nargs=2, metavar=("CUDA_HOME", "ARCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    # Also where the shell ignores Ctrl-C (background jobs): parts inherit that, and could not be interrupted.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    LOGS.mkdir(parents=True, exist_ok=True)
    if args.golden:
        return golden(Path(args.golden[0]), args.golden[1], args.dry)
    if missing := [package for name, package in NEEDED.items() if not importlib.util.find_spec(name)]:
        sys.exit(f"gpu_check: first {sys.executable} -m pip install {' '.join(map(repr, missing))}")
    if args.library:
        install_library(args.library)
    facts, home = gather_facts(args.arch if args.dry else ""), None if args.library else find_cuda_home()
    every = list_dry_parts(facts, home) if args.dry else list_parts(facts, home, len(os.sched_getaffinity(0)))
    order = [part.name for part in every]
    wanted = args.only.split(",") if args.only else order
    if unknown := {*wanted} - {*order}:
        sys.exit(f"gpu_check: no part {', '.join(sorted(unknown))}; there are {', '.join(order)}")

    from harness.machine_folder import machine_folder

    folder = LOGS / "dry" if args.dry else ROOT / "benchmarks" / "results" / machine_folder(facts["card"])
    path = (args.results or folder) / "gpu_check.json"
    done = gpu_report.read_result(path)
    parts = [p for p in every if p.name in wanted and not (args.resume and gpu_report.has_passed(p.name, done, facts))]
    end, good = time.monotonic() + args.seconds, True
    for part in parts:
        try:
            entry = run(part, min(part.limit_s, end - time.monotonic()))
        except KeyboardInterrupt as interruption:
            (entry,) = interruption.args
        gpu_report.add_entry(path, facts, part.name, entry)
        passed = entry["status"] in (PASSED, NOT_FINISHED) or (entry["status"] == NOT_RUN and part.optional)
        good = good and passed
        print(f"{part.name:10} {entry['status']:12} {entry['seconds']:6.1f} s  {entry['detail']}", flush=True)
        if not passed and entry["seconds"]:
            log = (LOGS / f"{part.name}.log").read_text(errors="replace")
            print("\n".join(["---", *log.splitlines()[-30:], "---"]), flush=True)
        if entry["status"] == "interrupted" or (not passed and part.name in ("build", "library")):
            break
    print(f"\n{gpu_report.format_report(gpu_report.read_result(path), facts, order)}\n\n-> {path}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
