"""Runs PEFT's LoRA tests with and without lora_ext's layers: tests that pass without them must pass with them.

    python scripts/peft_conformance.py PEFT_SOURCE [--tests FILE ...] [--select EXPRESSION] [--other-seeds 1,2,3]

PEFT_SOURCE is a source tree of peft; its tests need the packages ``diffusers`` and ``datasets``, and some other files
than the default one ``parameterized``, ``attrs`` or a network (their tests then fail both ways). The tests run twice in
parallel, without and with ``accelerate()``, each test from the same seed in both. Many compare results of random models
to a few units of float32's rounding, and sometimes fail with PEFT alone. So a test that fails only with lora_ext must
pass from three other seeds, and is named. Exit status 1: a test does not, or no forward or merge used lora_ext.

For pytest this file is a plugin (``-p peft_conformance``), which seeds, accelerates and writes the outcomes.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import os
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

import pytest

TESTS = "tests/test_custom_models.py"
SELECTION = (
    "lora and not adalora and not tinylora and not vblora and not randlora and not gralora and not delora "
    "and not unilora"
)
HERE = Path(__file__).resolve().parent

# --- the plugin -------------------------------------------------------------------------------------------------------

outcomes: dict[str, str] = {}
calls: collections.Counter[str] = collections.Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("lora_ext")
    group.addoption("--lora-ext", action="store_true", help="with lora_ext's layers")
    group.addoption("--first-seed", type=int, default=0)
    group.addoption("--outcomes", type=Path, help="the JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--lora-ext"):
        return
    from lora_ext import functional
    from lora_ext.integrations.peft import accelerate, embedding, linear, merging, parameter

    for module, name in (
        (linear, "lora_linear"),
        (linear, "lora_delta_"),
        (linear, "add_chosen"),
        (linear, "linear_with_chosen"),
        (functional, "lora_linear"),  # layers that share inputs
        (functional, "lora_linear_siblings"),
        (functional, "lora_delta_siblings"),
        (parameter, "call_with_updates"),
        (embedding, "expand_onto"),
        (merging, "merge_all_"),
        (merging, "merge_quantized_"),
        (merging, "unmerge_all_"),
    ):
        setattr(module, name, _counted(getattr(module, name)))
    accelerate()


def _counted(function):
    @functools.wraps(function)
    def counted(*args, **kwargs):
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return counted


def pytest_runtest_setup(item: pytest.Item) -> None:
    import torch

    torch.manual_seed(zlib.crc32(item.nodeid.encode()) + item.config.getoption("--first-seed"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or not report.passed:
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish(session: pytest.Session) -> None:
    if path := session.config.getoption("--outcomes"):
        path.write_text(json.dumps({"outcomes": outcomes, "calls": calls}))


# --- the comparison ---------------------------------------------------------------------------------------------------


def start(source: Path, outcomes_file: Path, *arguments: str) -> subprocess.Popen:
    # The tree's packages come first; nothing is written into the tree.
    path = [str(source / "src"), str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
    }
    command = [sys.executable, "-m", "pytest", "-p", "peft_conformance", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-q", "-W", "ignore", "--tb=short", f"--outcomes={outcomes_file}", *arguments]
    log = outcomes_file.with_suffix(".log").open("w")
    return subprocess.Popen(command, cwd=source, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen, outcomes_file: Path) -> tuple[dict[str, str], dict[str, int]]:
    process.wait()
    log = outcomes_file.with_suffix(".log").read_text()
    if process.returncode not in (0, 1) or not outcomes_file.exists():  # the tests did not run to the end
        sys.exit(f"pytest ended with {process.returncode}:\n{log[-4000:]}")
    found = json.loads(outcomes_file.read_text())
    return found["outcomes"], found["calls"]


def passing(outcomes: dict[str, str]) -> set[str]:
    return {test for test, outcome in outcomes.items() if outcome == "passed"}


def again(source: Path, tests: set[str], seeds: list[int], folder: Path) -> set[str]:
    """Returns those of ``tests`` that also fail with lora_ext from one of the seeds."""
    failing: set[str] = set()
    for seed in seeds:
        file = folder / f"seed{seed}.json"
        found, _ = finish(start(source, file, "--lora-ext", f"--first-seed={seed}", *sorted(tests)), file)
        failing |= tests - passing(found)
    return failing


def complaints(broken: set[str], calls: dict[str, int]) -> list[str]:
    lines = [f"FAILS with lora_ext, passes without: {test}" for test in sorted(broken)]
    idle = [name for name in ("lora_linear", "merge_all_") if not calls.get(name)]
    return lines + ([f"FAILS: {' and '.join(idle)} never ran, so nothing was tested"] if idle else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="PEFT_SOURCE", type=Path)
    parser.add_argument("--other-seeds", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 3])
    parser.add_argument("--tests", nargs="+", default=[TESTS], metavar="FILE", help=f"default: {TESTS}")
    parser.add_argument("--select", default=SELECTION, metavar="EXPRESSION", help='pytest\'s -k; "" for all tests')
    args = parser.parse_args()
    source = args.source.resolve()
    for file in args.tests:
        if not (source / file).exists():
            sys.exit(
                f"{str(source)!r} is not a source tree of peft (it has no {file}); give its path, or set PEFT_SOURCE"
            )
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / "without.json", Path(name) / "with.json"]
        runs = [start(source, files[0], *args.tests, "-k", args.select)]
        runs.append(start(source, files[1], "--lora-ext", *args.tests, "-k", args.select))
        (without, _), (with_us, calls) = (finish(run, file) for run, file in zip(runs, files, strict=True))
        only_without = passing(without) - passing(with_us)
        broken = again(source, only_without, args.other_seeds, Path(name)) if only_without else set()
    for what, found in (("PEFT alone", without), ("with lora_ext", with_us)):
        counts = collections.Counter(found.values())
        print(f"{what}: {', '.join(f'{count} {outcome}' for outcome, count in sorted(counts.items()))}")
    print("through lora_ext:", ", ".join(f"{count} calls of {name}" for name, count in calls.items()) or "nothing")
    for test in sorted(only_without - broken):
        print(f"passes from the seeds {args.other_seeds}, as with PEFT; not from the first: {test}")
    found = complaints(broken, calls)
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
