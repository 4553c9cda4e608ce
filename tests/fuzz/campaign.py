"""Runs the cases of an area in a process of their own, which is started again after a crash; counts and collects."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from support.processes import Forked

from .cases import Finding
from .worker import is_sanitized

_TESTS = Path(__file__).parents[1]


@dataclass
class Found:
    """A kind of finding: its first case, and how many there are."""

    finding: Finding
    seed: int
    source: str
    count: int = 0

    def text(self) -> str:
        return f"{self.finding.signature}\n  {self.finding.detail}\n  first with seed {self.seed}\n{self.source}"


@dataclass
class Campaign:
    """The result of many cases: how often each function had which outcome, and the findings by their signature."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    found: dict[str, Found] = field(default_factory=dict)

    def total(self, *kinds: str) -> int:
        """Number of cases with these outcomes, or of all."""
        return sum(n for counter in self.counts.values() for kind, n in counter.items() if not kinds or kind in kinds)

    def table(self) -> str:
        """Formats how often each function was called, with which outcomes."""
        return "\n".join(f"{function}: {dict(counter)}" for function, counter in sorted(self.counts.items()))

    def texts(self) -> str:
        return "\n".join(found.text() for found in self.found.values())


class Ended(Exception):
    """Raised if the process has ended."""


class _Worker:
    def __init__(self, area: str, folder: str, seconds: tuple[int, int]) -> None:
        variables = {"PYTHONFAULTHANDLER": "1", "OMP_WAIT_POLICY": "passive"}
        arguments = "-m", "fuzz.worker", area, *map(str, seconds)
        self._errors: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  open as long as the process
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "cwd": folder, "text": True}
        if is_sanitized():
            path = [str(_TESTS), os.getcwd(), os.environ.get("PYTHONPATH", "")]  # the second has its library
            variables = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, path))}
            self._process = subprocess.Popen([sys.executable, *arguments], env=variables, **how)
        else:
            self._process = Forked(*arguments, **how, **variables)

    def ask(self, seed: int) -> None:
        self._process.stdin.write(f"{seed}\n")
        self._process.stdin.flush()

    def reply(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise Ended
        return json.loads(line)

    def end(self) -> tuple[int, str]:
        """Waits for the end of the process; returns its exit code and the last that it printed."""
        self._process.stdin.close()
        code = self._process.wait()
        self._errors.seek(0)
        return code, self._errors.read()[-20000:]


def run(
    area: str,
    seeds: Iterable[int],
    tell: Callable[[str], None] = lambda text: None,
    only: Sequence[str] | None = None,
    end: float = float("inf"),
    seconds: tuple[int, int] = (30, 120),
) -> Campaign:
    """Runs the cases of all seeds, or those that start before ``end`` of the monotonic clock.

    ``only``: kinds of findings to report. ``seconds``: limits of a case, of processor time because other processes can
    delay this one, and of time for a case that waits.
    """
    campaign, worker = Campaign(), None
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for seed in seeds:
            if time.monotonic() > end:
                break
            worker = worker or _Worker(area, folder, seconds)
            case = {"function": "?", "source": ""}
            try:
                worker.ask(seed)
                case = worker.reply()
                done = worker.reply()
                kind, findings = done["kind"], [Finding(**entry) for entry in done["findings"]]
            except (Ended, BrokenPipeError):
                findings = [_ended(case["function"], *worker.end())]
                kind, worker = findings[0].kind, None
            campaign.counts[case["function"]][kind] += 1
            for finding in findings:
                if only is None or finding.kind in only:
                    new = finding.signature not in campaign.found
                    found = campaign.found.setdefault(finding.signature, Found(finding, seed, case["source"]))
                    found.count += 1
                    if new:
                        tell(found.text())
        if worker:
            worker.end()  # by itself, so that a sanitizer can report
    return campaign


def _ended(function: str, code: int, said: str) -> Finding:
    kind = "hang" if -code in (signal.SIGXCPU, signal.SIGALRM) else "crash"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    sanitizer = re.search(r"ERROR: (\w+Sanitizer: [\w-]+)|(runtime error: .*)", said)
    frames = re.findall(r'File "[^"]*lora_ext/([^"]+)", line \d+ in (\w+)', said)
    place = sanitizer[0] if sanitizer else ":".join(frames[0]) if frames else ""
    return Finding(kind, function, f"{kind}: {function}: {how} {place}", f"{how}\n{said[-1500:]}")
