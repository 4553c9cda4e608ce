"""Cases that hypothesis draws and shrinks; each runs in a process of its own, which is started again after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import hypothesis
from hypothesis import strategies as st
from support.processes import Forked

from .calls import Call
from .cases import Finding, Outcome
from .choices import Choices
from .ops import make
from .worker import is_sanitized

_TESTS = Path(__file__).parents[1]


@dataclass
class Campaign:
    """How often each function had which outcome, and a text of each kind of finding, from its smallest case."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    found: dict[str, str] = field(default_factory=dict)

    def total(self, *kinds: str) -> int:
        """Number of cases with these outcomes, or of all."""
        return sum(n for counter in self.counts.values() for kind, n in counter.items() if not kinds or kind in kinds)

    def table(self) -> str:
        """Formats how often each function was called, with which outcomes, and the findings."""
        lines = [f"{function}: {dict(counter)}" for function, counter in sorted(self.counts.items())]
        return "\n".join([*lines, *self.found.values()])


class _Worker:
    """Runs cases in a process of its own, which it starts when there is none."""

    def __init__(self, function: str, folder: str, seconds: tuple[int, int]) -> None:
        self._arguments, self._folder = ("-m", "fuzz.worker", function, *map(str, seconds)), folder
        self._process: subprocess.Popen | Forked | None = None
        self._errors: IO[str]

    def _start(self) -> None:
        variables = {"PYTHONFAULTHANDLER": "1", "OMP_WAIT_POLICY": "passive", "TMPDIR": self._folder}
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  open as long as the process
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True}
        if is_sanitized():
            path = [str(_TESTS), os.getcwd(), os.environ.get("PYTHONPATH", "")]  # the second has its library
            variables = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, path))}
            self._process = subprocess.Popen([sys.executable, *self._arguments], env=variables, cwd=self._folder, **how)
        else:
            self._process = Forked(*self._arguments, cwd=self._folder, **how, **variables)

    def run(self, function: str, drawn: list[int]) -> Outcome:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(f"{json.dumps(drawn)}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            finding = _ended(function, *self.end())
            return Outcome(finding.kind, [finding])
        reply = json.loads(line)
        return Outcome(reply["kind"], [Finding(**entry) for entry in reply["findings"]])

    def end(self) -> tuple[int, str]:
        """Lets the process end by itself, so that a sanitizer can report; returns its exit code and its last output."""
        if self._process is None:
            return 0, ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        code = self._process.wait()
        self._errors.seek(0)
        self._process = None
        return code, self._errors.read()[-20000:]


@st.composite
def _calls(draw: st.DrawFn, function: str) -> tuple[Call, list[int]]:
    drawn: list[int] = []

    def one_of(count: int) -> int:
        drawn.append(draw(st.integers(0, count - 1)))
        return drawn[-1]

    return make(Choices(one_of), function), drawn


def run(
    function: str,
    cases: int,
    seed: int = 0,
    only: Sequence[str] | None = None,
    seconds: tuple[int, int] = (30, 120),
    shrink: bool = True,
) -> Campaign:
    """Runs calls of a function ("": any) until one finds something, which is then made as small as it can be.

    ``cases``: their number. ``only``: kinds of findings to report. ``seconds``: limits of a case, of processor time
    because other processes can delay this one, and of time for a case that waits.
    """
    campaign = Campaign()
    kinds: dict[str, type[Exception]] = {}  # of one class each, which hypothesis tells apart

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        worker = _Worker(function, folder, seconds)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrink else [])],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(_calls(function))
        def examine(made: tuple[Call, list[int]]) -> None:
            call, drawn = made
            outcome = worker.run(call.function, drawn)
            campaign.counts[call.function][outcome.kind] += 1
            findings = [finding for finding in outcome.findings if only is None or finding.kind in only]
            for finding in findings:
                name = finding.signature
                campaign.found[name] = f"{name}\n  {finding.detail}\n  with the seed {seed}\n{call.source()}"
            if findings:
                raise kinds.setdefault(name, type(name, (Exception,), {}))

        try:
            examine()
        except Exception:
            if not campaign.found:
                raise
        worker.end()
    return campaign


def _ended(function: str, code: int, said: str) -> Finding:
    kind = "hang" if -code in (signal.SIGXCPU, signal.SIGALRM) else "crash"
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    sanitizer = re.search(r"ERROR: (\w+Sanitizer: [\w-]+)|(runtime error: .*)", said)
    frames = re.findall(r'File "[^"]*lora_ext/([^"]+)", line \d+ in (\w+)', said)
    place = sanitizer[0] if sanitizer else ":".join(frames[0]) if frames else ""
    return Finding(kind, function, f"{kind}: {function}: {how} {place}", f"{how}\n{said[-1500:]}")
