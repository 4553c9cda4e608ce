"""Builds, tests and measures lora_ext on the GPU of this machine; see gpu_check.sh.

    python scripts/gpu_check.py [--seconds 470] [--only build,tests] [--results DIR]

Each part is a process with its own time limit, so that a part that fails or hangs does not take time from later ones.
Prints one table at the end, writes benchmarks/results/<card>/gpu_check.json, and keeps each part's output in
build/gpu_check/. Exit status 0: every part passed, or only compute-sanitizer is missing.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
from harness.machine_folder import machine_folder  # noqa: E402

LOGS = ROOT / "build" / "gpu_check"
RESULTS = ROOT / "benchmarks" / "results"

PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "out of time", "not run"


# --- the parts --------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    name: str
    command: list[str]
    limit_s: float  # maximum
    least_s: float  # reserved for it while earlier parts run
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str = ""  # why it cannot run here
    needs: tuple[str, ...] = ()  # parts that must pass first


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float
    command: str
    detail: str  # the last informative line of its output


def seconds_for(part: Part, later: list[Part], remaining_s: float) -> float:
    """The part's share of the remaining time: at most its limit, without the minimum of later parts."""
    return max(min(part.limit_s, remaining_s - sum(other.least_s for other in later)), 0.0)


def arch_of(capability: tuple[int, int]) -> str:
    """Returns nvcc's name of the architecture to build for."""
    major, minor = capability
    return f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def find_cuda_home(torch_cuda: str, candidates: list[Path]) -> Path | None:
    """Finds the first toolkit of torch's CUDA version, else of its major version. candidates: best first."""

    def version(home: Path) -> str:
        try:
            text = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        except OSError:
            return ""
        match = re.search(r"release (\d+\.\d+)", text)
        return match[1] if match else ""

    versions = {home: version(home) for home in candidates}
    major = torch_cuda.partition(".")[0] + "."
    for fits in (lambda found: found == torch_cuda, lambda found: found.startswith(major)):
        for home, found in versions.items():
            if found and fits(found):
                return home
    return None


def cuda_home_candidates() -> list[Path]:
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):  # can be a wrapper script: ask it for its toolkit
        dryrun = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
        homes += [Path(top[1].strip()).resolve()] if (top := re.search(r"^#\$ TOP=(.+)$", dryrun.stderr, re.M)) else []
    homes += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    homes += [home for path in sys.path for home in sorted(Path(path or ".").glob("nvidia/cu[0-9]*"))]
    return homes


def find_sanitizer(home: Path | None) -> str | None:
    places = [home / "bin", home / "compute-sanitizer"] if home else []
    found = shutil.which("compute-sanitizer")
    return found or next((str(p / "compute-sanitizer") for p in places if (p / "compute-sanitizer").exists()), None)


def list_parts(facts: dict[str, str], home: Path | None, cores: int) -> list[Part]:
    python = sys.executable
    arch = facts["arch"]
    sanitizer = find_sanitizer(home)
    workers = ["-n", str(min(8, cores))] if importlib.util.find_spec("xdist") else []
    no_toolkit = "" if home else f"no CUDA toolkit for torch's CUDA {facts['cuda']}: set CUDA_HOME"
    build = {"LORA_EXT_CUDA": "1", "LORA_EXT_CUDA_ARCHS": arch, "CUDA_HOME": str(home or ""), "MAX_JOBS": str(cores)}

    def sanitize(tool: str, **environment: str) -> Part:
        command = [sanitizer or "compute-sanitizer", "--tool", tool, "--kernel-name", "kns=lora_ext"]
        command += ["--error-exitcode", "99", python, "scripts/sanitize_ops.py"]
        reason = "" if sanitizer else "compute-sanitizer is not installed"
        return Part(tool, command, 60, 20, environment, reason, ("build",))

    layer = [python, "benchmarks/bench_layer.py", "--device", "cuda", "--json", str(LOGS / "layer.json")]
    kernels = [python, "benchmarks/bench_kernels.py", "--json", str(LOGS / "kernels.json")]
    return [
        Part("build", [python, "setup.py", "build_ext", "--inplace"], 200, 60, build, no_toolkit),
        Part("golden", [python, "scripts/gpu_check.py", "--golden", str(home), arch], 40, 15, {}, no_toolkit),
        Part("small", [python, "scripts/sanitize_ops.py"], 30, 10, {}, "", ("build",)),
        Part(
            "tests",
            [python, "-m", "pytest", "--device", "cuda", "-q", "-p", "no:cacheprovider", "--tb=short", *workers]
            + ["--continue-on-collection-errors"],
            180,
            60,
            {"OMP_WAIT_POLICY": "passive"},
            "" if importlib.util.find_spec("pytest") else "pytest is not installed: the suite did not run",
            ("build",),
        ),
        # Without the caching allocator's pools, every tensor has its own bounds.
        sanitize("memcheck", PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
        sanitize("racecheck"),
        Part("kernels", [*kernels, "--seconds", "45"], 75, 40, {}, "", ("build",)),
        Part("layer", [*layer, "--seconds", "60"], 90, 50, {}, "", ("build",)),
    ]


# --- running ----------------------------------------------------------------------------------------------------------


def shown(command: list[str]) -> str:
    """Formats a command without this machine's paths."""
    return " ".join("python" if word == sys.executable else word.replace(f"{ROOT}/", "") for word in command)


def run(part: Part, limit_s: float) -> Outcome:
    command = shown(part.command)
    if part.not_run:
        return Outcome(part.name, NOT_RUN, 0.0, command, part.not_run)
    if limit_s < 5:
        return Outcome(part.name, TIMED_OUT, 0.0, command, "no time left")
    log = LOGS / f"{part.name}.log"
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"} | part.environment
    begin = time.monotonic()
    with log.open("w") as output:
        # In a new process group, so that at the limit the part's children end, too.
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    seconds, text = time.monotonic() - begin, log.read_text(errors="replace")
    status = TIMED_OUT if code is None else PASSED if code == 0 else FAILED
    if status == FAILED and "Device not supported" in text:  # a machine that hides the debugging interface
        return Outcome(part.name, NOT_RUN, seconds, command, "compute-sanitizer does not support this machine")
    return Outcome(part.name, status, seconds, command, telling_line(text))


def telling_line(text: str) -> str:
    """Returns the line that says how a part went: pytest's or the sanitizer's summary, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    summaries = [line for line in lines if re.search(r"ERROR SUMMARY|RACECHECK SUMMARY|\d+ passed|\d+ failed", line)]
    return (summaries or lines or [""])[-1].strip("= ")


def run_all(parts: list[Part], budget_s: float, clock=time.monotonic, run_part=run) -> list[Outcome]:
    end = clock() + budget_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        missing = [o.name for o in outcomes if o.name in part.needs and o.status != PASSED]
        if missing:
            outcome = Outcome(part.name, FAILED, 0.0, shown(part.command), f"{missing[0]} did not pass")
        else:
            later = [other for other in parts[number + 1 :] if not other.not_run]
            outcome = run_part(part, seconds_for(part, later, end - clock()))
        outcomes.append(outcome)
        print(f"{outcome.name:10} {outcome.status:12} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
    return outcomes


def exit_status(outcomes: list[Outcome]) -> int:
    """Returns 0 if nothing failed. A missing sanitizer is no failure; missing pytest is one."""
    excused = {"memcheck", "racecheck"}
    return int(any(o.status != PASSED and not (o.status == NOT_RUN and o.name in excused) for o in outcomes))


# --- the primitives' known answers ------------------------------------------------------------------------------------


def golden(home: str, arch: str) -> int:
    """Runs tests/simt/golden.cu on the GPU: do the PTX instructions behave like their CPU stand-in?"""
    source = ROOT / "tests" / "simt" / "golden.cu"
    library = LOGS / "golden.so"
    command = [f"{home}/bin/nvcc", "-shared", "-std=c++20", "-Xcompiler=-fPIC", "--expt-relaxed-constexpr"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    sys.path.insert(0, str(ROOT / "tests"))
    import torch
    from simt.golden import PRIMITIVES

    run_primitive = ctypes.CDLL(str(library)).golden
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


# --- the report -------------------------------------------------------------------------------------------------------


def gather_facts() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"gpu_check: torch {torch.__version__} finds no GPU")

    def says(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return ""

    commit = says("git", "rev-parse", "HEAD") or "unknown"
    changed = "+changes" if says("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "card": torch.cuda.get_device_name(),
        "arch": arch_of(torch.cuda.get_device_capability()),
        "driver": says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "commit": commit + changed,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def read_json(path: Path) -> object:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def collect(facts: dict[str, str], outcomes: list[Outcome], kernels: object, layer: object) -> dict[str, object]:
    measured = kernels if isinstance(kernels, dict) else {}
    return {
        **facts,
        "command": " ".join(["scripts/gpu_check.sh", *sys.argv[1:]]),
        "parts": [vars(outcome) for outcome in outcomes],
        "ceilings": measured.get("ceilings"),
        "kernels": measured.get("rows"),
        "layer": layer,
    }


def format_report(result: dict) -> str:
    """Formats tables of the parts, the kernels' stages and the layers."""
    lines = [f"{result['card']}, driver {result['driver']}, torch {result['torch']}, nvcc {result['nvcc']}"]
    lines[0] += f", commit {result['commit'][:12]}, {result['date']}"
    lines += ["", "| part | status | seconds | |", "|---|---|---|---|"]
    for part in result["parts"]:
        lines.append(f"| {part['name']} | {part['status']} | {part['seconds']:.0f} | {part['detail'][:100]} |")
    if result["ceilings"]:
        copy, *matrix = result["ceilings"].items()
        rates = ", ".join(f"{name.removeprefix('matrix_')} {value / 1e12:.0f}" for name, value in matrix)
        lines += ["", f"copy {copy[1] / 1e9:.0f} GB/s; matrix products, TFLOP/s: {rates}"]
    if result["kernels"]:
        from bench_kernels import table

        lines += ["", table(result["kernels"])]
    if result["layer"]:
        from bench_layer import table

        lines += ["", table(result["layer"])]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=465.0, help="for all parts together")
    parser.add_argument("--only", help="these parts, separated by commas")
    parser.add_argument("--results", type=Path, help="folder of gpu_check.json; the card's in benchmarks/results")
    parser.add_argument("--golden", nargs=2, metavar=("CUDA_HOME", "ARCH"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    if args.golden:
        return golden(*args.golden)

    facts = gather_facts()
    home = find_cuda_home(facts["cuda"], cuda_home_candidates())
    nvcc = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout if home else ""
    facts["nvcc"] = match[1] if (match := re.search(r"V(\d+\.\d+\.\d+)", nvcc)) else "none"
    print(f"{facts['card']}: building for sm_{facts['arch']} with {home or 'no toolkit'}", flush=True)
    parts = list_parts(facts, home, len(os.sched_getaffinity(0)))
    if args.only:
        wanted = set(args.only.split(","))
        if unknown := wanted - {part.name for part in parts}:
            sys.exit(f"gpu_check: no part {', '.join(sorted(unknown))}; there are {', '.join(p.name for p in parts)}")
        parts = [part for part in parts if part.name in wanted]
    for name in ("kernels", "layer"):
        (LOGS / f"{name}.json").unlink(missing_ok=True)

    outcomes = run_all(parts, args.seconds)
    result = collect(facts, outcomes, read_json(LOGS / "kernels.json"), read_json(LOGS / "layer.json"))
    # With --only, the result is partial and does not replace a whole one.
    folder = LOGS if args.only else args.results or RESULTS / machine_folder(facts["card"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "gpu_check.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for outcome in outcomes:
        if outcome.status in (FAILED, TIMED_OUT) and (log := LOGS / f"{outcome.name}.log").exists():
            print(f"\n--- {outcome.name}: the end of {log.relative_to(ROOT)}")
            print("\n".join(log.read_text(errors="replace").splitlines()[-30:]))
    sys.path.insert(0, str(ROOT))
    print(f"\n{format_report(result)}\n\n-> {path}")
    return exit_status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
