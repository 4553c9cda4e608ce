"""Scores the tests of tests/simt: how many of several hundred small faults in the kernels do they find?

    python -m simt.kernel_mutants --number 240 --seed 1 --out score.json      (make mutants)

All faults are in one library, each behind a switch (faults.py). A first run of the tests finds which of them run
through which faults. Then one fault after the other is active in a process of its own, which runs these tests, the
fastest first, until one fails, crashes or takes much longer than before.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

from . import build, driver, faults
from .faults import Fault

FOLDER = build.CACHE / "mutants"
EXTRA = 1.15  # chosen faults for each that is wanted: some do not compile
SLOWER, GRACE = 20, 20  # a test runs at most GRACE + SLOWER * its time seconds
ENDS = {0: "missed", 1: "failed", -signal.SIGALRM: "took too long"}  # of a process


# --- the library ------------------------------------------------------------------------------------------------------


def build_mutants(number: int, seed: int) -> tuple[list[Fault], driver.Library]:
    """Builds a library with ``number`` faults. Faults that do not compile are left out."""
    chosen = faults.choose(int(number * EXTRA), seed)
    while True:
        faults.plant(chosen, FOLDER)
        wrong = _lines_with_errors()
        if not wrong:
            break
        kept = [fault for fault in chosen if (fault.path, fault.line) not in wrong]
        assert len(kept) < len(chosen), f"errors at lines without a fault: {sorted(wrong)}"
        print(f"{len(chosen) - len(kept)} faults do not compile", flush=True)
        chosen = kept
    chosen = chosen[:number]
    faults.plant(chosen, FOLDER)
    library = driver.kernel_library("mutants", FOLDER / "csrc/cuda", (build.SIMT / "mutants/faults.cpp",))
    return chosen, library


def _lines_with_errors() -> set[tuple[str, int]]:
    def errors(path: Path) -> str:
        command = [*build.command(build.KERNEL_FLAGS), "-fsyntax-only", str(path)]
        return subprocess.run(command, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(2) as pool:
        found = "\n".join(pool.map(errors, sorted((FOLDER / "csrc/cuda").rglob("*.cu"))))
    places = re.findall(r"^(\S+?):(\d+):\d+: (?:fatal )?error", found, re.MULTILINE)
    return {(str(Path(os.path.realpath(path)).relative_to(FOLDER)), int(line)) for path, line in places}


# --- the tests --------------------------------------------------------------------------------------------------------


class Campaign:
    """A pytest plugin: runs the collected tests once, then those of each fault that is not known to change nothing."""

    def __init__(self, library: driver.Library, planted: list[Fault], only: list[int] | None):
        self.library, self.planted = library, planted
        self.numbers = range(len(planted)) if only is None else only
        self.results: list[dict] = []

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        items, known = session.items, equivalents()
        print(f"{len(items)} tests, {len(self.numbers)} faults", flush=True)
        status, runs = in_child(lambda send: send([self._run(item) for item in items]))
        assert status == 0, "the tests crash without a fault"
        failed = [item.nodeid for item, (passed, _, _) in zip(items, runs, strict=True) if not passed]
        assert not failed, f"tests fail without a fault: {failed}"
        for number in self.numbers:
            fault = self.planted[number]
            result = dict(file=fault.path, line=fault.line, kind=fault.kind, text=fault.text)
            if fault.name in known:
                result |= dict(end="equivalent", by=known[fault.name], tests=0)
            else:
                tests = sorted((seconds, i) for i, (_, seconds, reached) in enumerate(runs) if number in reached)
                status, last = in_child(functools.partial(self._hunt, number, items, tests))
                by = items[last].nodeid if status else ""
                result |= dict(end=ENDS.get(status, "crashed"), by=by, tests=len(tests))
            self.results.append(result)
            print(number, result["end"], fault, result["by"], flush=True)
        return True

    def _run(self, item: pytest.Item) -> tuple[bool, float, list[int]]:
        """Runs a test without a fault. Returns whether it passed, its seconds, and the faults in its way."""
        start = time.monotonic()
        passed = passes(item)
        reached = (ctypes.c_uint8 * len(self.planted))()
        self.library.c.simt_reached(reached, len(reached))
        return passed, time.monotonic() - start, [number for number, here in enumerate(reached) if here]

    def _hunt(self, number: int, items: list[pytest.Item], tests: list[tuple[float, int]], send: Callable) -> None:
        """Runs tests with a fault; ends the process with 1 if one fails."""
        driver.Library._place = lambda library, offset: ("", 0)  # addr2line takes a second
        self.library.c.simt_plant(number)
        for seconds, i in tests:
            send(i)
            signal.setitimer(signal.ITIMER_REAL, GRACE + SLOWER * seconds)
            if not passes(items[i]):
                os._exit(1)


def passes(item: pytest.Item) -> bool:
    return not any(report.failed for report in runtestprotocol(item, nextitem=None, log=False))


def in_child(run: Callable) -> tuple[int, object]:
    """Calls ``run(send)`` in a child. Returns its exit code, or the negative signal, and what it sent last."""
    receiving, sending = os.pipe()
    if (child := os.fork()) == 0:
        quiet, shown = os.open(os.devnull, os.O_WRONLY), os.dup(2)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            run(lambda value: os.write(sending, json.dumps(value).encode() + b"\n"))
        except Exception:
            os.write(shown, traceback.format_exc().encode())
            os._exit(2)
        os._exit(0)
    os.close(sending)
    with open(receiving) as pipe:
        lines = pipe.read().splitlines()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != 2, "an error in this script"
    return status, json.loads(lines[-1]) if lines else None


# --- the score --------------------------------------------------------------------------------------------------------


def equivalents() -> dict[str, str]:
    """Returns the names of faults that change no result, and the reasons."""
    reasons, reason = {}, ""
    for line in (build.SIMT / "mutants/equivalent.txt").read_text().splitlines():
        if line.startswith("  "):
            reasons[line.strip()] = reason
        elif not line.startswith("#"):
            reason = line
    return reasons


def print_score(results: list[dict]) -> None:
    planted, missed, same = Counter(), Counter(), Counter()
    for result in results:
        file, end = result["file"], result["end"]
        planted[file] += 1
        missed[file] += end == "missed"
        same[file] += end == "equivalent"
    print(f"\n{'file':40} planted  found  equivalent")
    for file in sorted(planted):
        print(f"{file:40} {planted[file]:7} {planted[file] - missed[file] - same[file]:6} {same[file]:11}")
    for result in results:
        if result["end"] == "missed":
            unseen = "" if result["tests"] else " (no test runs it)"
            print(f"missed{unseen}: line {result['line']} of {result['file']}: {result['kind']}: {result['text']}")
    found = len(results) - missed.total() - same.total()
    for count, what in ((len(results), "all faults"), (len(results) - same.total(), "those that change a result")):
        print(f"{found} of {count} found: {100 * found / count:.1f} % of {what}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=240, help="of faults")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    parser.add_argument("--tests", nargs="+", default=[str(build.SIMT)])
    parser.add_argument("--only", type=int, nargs="*", help="numbers of faults to try again")
    options = parser.parse_args()
    planted, library = build_mutants(options.number, options.seed)
    driver.kernel_library = lambda *_: library
    campaign = Campaign(library, planted, options.only)
    arguments = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:timeout", "--tb=no", *options.tests]
    if pytest.main(arguments, plugins=[campaign]) not in (0, 5):
        return 1
    print_score(campaign.results)
    if options.out:
        options.out.write_text(json.dumps(campaign.results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
