"""Runs the op tests and the op fuzzer under a sanitizer, and checks that it finds a planted bug.

    PYTHONPATH=tests python -m sanitize asan ubsan tsan [--quick]

Exit status 0: nothing was found in the code, and the planted bug was found.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from support.object_cache import ROOT

from .builds import Build
from .planted import CALL, PLANTED, PlantedBug
from .sanitizers import SANITIZERS, Sanitizer, compiler

OP_TESTS = (
    "ops/test_bad_arguments",
    "ops/test_base_product",
    "ops/test_bottleneck",
    "ops/test_few_tokens",
    "ops/test_grouped",
    "ops/test_lora_linear",
    "ops/test_siblings",
    "ops/test_values",
    "ops/test_lora_merge",
    "ops/test_merge_ops",
    "merging/test_merges_of_models_refused",
    "nn/test_linear",
)
QUICK_TESTS = ("ops/test_base_product", "ops/test_few_tokens", "ops/test_merge_ops")


class Runner:
    """Runs steps of one sanitizer, two at a time; prints a line per step and counts those that found something."""

    def __init__(self, sanitizer: Sanitizer):
        self.sanitizer, self.build = sanitizer, Build(sanitizer)
        self.reports = self.build.folder / "reports"
        self.found = self.steps = 0
        self.preloaded = [self.build.openmp] if sanitizer.name == "tsan" else []
        shutil.rmtree(self.reports, ignore_errors=True)
        self.reports.mkdir(parents=True)

    def say(self, text: str) -> None:
        print(f"{self.sanitizer.name}: {text}", flush=True)

    def run(
        self, name: str, command: list[str], cwd: Path, variables: Mapping[str, str] | None = None, **options: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str], float]:
        """Runs a command; returns its result, its reports and its seconds."""
        reports = self.reports / name.replace(" ", "-").replace(",", "")
        environment = {**os.environ, **self.sanitizer.environment(reports, self.preloaded, **options)}
        environment |= {"OMP_WAIT_POLICY": "passive", "PYTHONDONTWRITEBYTECODE": "1", **(variables or {})}
        environment["PYTHONPATH"] = str(ROOT / "tests")  # the working directory comes before it
        begin = time.monotonic()
        result = subprocess.run(
            [*self.sanitizer.prefix(), *command], cwd=cwd, env=environment, capture_output=True, text=True
        )
        texts = [path.read_text(errors="replace") for path in sorted(self.reports.glob(f"{reports.name}.*"))]
        return result, [text for text in texts if self.sanitizer.report.search(text)], time.monotonic() - begin

    def expect_clean(self, name: str, command: list[str], cwd: Path, isa: str = "", **options: str) -> None:
        result, reports, seconds = self.run(name, command, cwd, {"LORA_EXT_CPU_ISA": isa}, **options)
        self.steps += 1
        summary = (result.stdout.strip().splitlines() or [""])[-1].strip("= ")
        if result.returncode == 0 and not reports:
            self.say(f"{name}: nothing found, {seconds:.0f} s; {summary}")
            return
        self.found += 1
        self.say(f"{name}: FOUND, exit status {result.returncode}, {len(reports)} reports; {summary}")
        print(excerpt(reports[:3]) or f"{result.stdout[-6000:]}{result.stderr[-6000:]}")

    def expect_planted(self, package: Path, bug: PlantedBug) -> None:
        """Checks that the planted bug is reported with its kind and place."""
        command = [sys.executable, "-c", CALL]
        result, reports, _ = self.run("planted bug", command, package, {"LORA_EXT_CPU_ISA": "generic"})
        self.steps += 1
        first = self.sanitizer.report.search(reports[0]) if reports else None
        good = first is not None and bug.report in first[0] and bug.place in reports[0]
        says = first[0] if first else f"no report, exit status {result.returncode}"
        self.say(f"planted bug: {'as it must be' if good else 'WRONG'}: {says}")
        if not good:
            self.found += 1
            print(excerpt(reports) or result.stderr[-3000:])


def excerpt(reports: list[str]) -> str:
    """Returns the start of each report, with shortened lines."""
    return "\n\n".join("\n".join(line[:180] for line in report.strip().splitlines()[:30]) for report in reports)


def available_isas(package: Path) -> list[str]:
    code = "from lora_ext import _load; print(*_load.available_cpu_isas())"
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()


def check(sanitizer: Sanitizer, quick: bool) -> bool:
    begin = time.monotonic()
    runner = Runner(sanitizer)
    build, bug = runner.build, PLANTED[sanitizer.name]
    package, planted = build.package, build.planted_package(bug)
    runner.say(f"{sanitizer.title} of {compiler()}; built in {time.monotonic() - begin:.0f} s")
    isas = available_isas(package)
    tests = [str(ROOT / "tests" / f"{name}.py") for name in (QUICK_TESTS if quick else OP_TESTS)]
    # The fuzzer limits its processes' address space, except under a sanitizer that takes terabytes of it.
    limits = {"max_allocation_size_mb": "1024"} if sanitizer.preload else {}
    steps = [
        partial(runner.expect_clean, "calls of the planted bug", [sys.executable, "-c", CALL], package, "generic"),
        partial(runner.expect_planted, planted, bug),
    ]
    for isa in sorted({isas[0], isas[-1]}) if quick else isas:
        command, options = fuzzer(500 if quick else 3000), limits | stack_options(sanitizer, isa)
        steps.append(partial(runner.expect_clean, f"op fuzzer, {isa}", command, package, isa, **options))
    for isa in isas[:1] if quick else isas:
        command, options = op_tests(isa, tests, build), stack_options(sanitizer, isa)
        steps.append(partial(runner.expect_clean, f"op tests, {isa}", command, package, isa, **options))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "2"))) as pool:
        list(pool.map(lambda step: step(), steps))
    found = f"{runner.found} of {runner.steps} runs FOUND something" if runner.found else "nothing found"
    runner.say(f"{runner.steps} runs in {time.monotonic() - begin:.0f} s: {found}")
    return runner.found == 0


def stack_options(sanitizer: Sanitizer, isa: str) -> dict[str, str]:
    """Returns options of a run on an instruction set.

    g++ 12.4 stores vectors of 64 bytes by aligned instructions on AddressSanitizer's stack of returned functions, whose
    frames are aligned to 32: whether the kernels crash there depends on what ran before.
    """
    has_64_bytes = "512" in isa or isa == "amx"
    return {"detect_stack_use_after_return": "0"} if sanitizer.name == "asan" and has_64_bytes else {}


def fuzzer(cases: int) -> list[str]:
    """Command that fuzzes the ops from fixed seeds; another test looks for wrong results."""
    command = [sys.executable, "-m", "fuzz", "--seed", "0", "--cases", str(cases)]
    return [*command, "--only", "crash", "hang"]


def op_tests(isa: str, tests: list[str], build: Build) -> list[str]:
    # Skips tests that run others on every instruction set, because this module does.
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "not instruction_set"]
    return [sys.executable, "-m", "pytest", *options, "--basetemp", str(build.folder / f"temporary-{isa}"), *tests]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("sanitizers", nargs="+", choices=SANITIZERS, help="which to run, one after the other")
    parser.add_argument("--quick", action="store_true", help="two instruction sets and a few tests")
    arguments = parser.parse_args()
    try:
        good = [check(SANITIZERS[name], arguments.quick) for name in arguments.sanitizers]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
