"""Cases that hypothesis draws and shrinks; each runs in a process of its own, which is started again after a crash."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
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

from .judge import Finding, Outcome
from .worker import is_sanitized

_TESTS = Path(__file__).parents[1]
_NUMBERS = 120  # of a case; those of larger calls end in the simplest choices


@dataclass
class Campaign:
    """How often each function had which outcome, and a text of each kind of finding, from its smallest case."""

    counts: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    found: dict[str, str] = field(default_factory=dict)

    def total(self) -> int:
        return sum(counter.total() for counter in self.counts.values())

    def table(self) -> str:
        """Formats how often each function was called, with which outcomes, and the findings."""
        lines = [f"{function}: {dict(counter)}" for function, counter in sorted(self.counts.items())]
        return "\n".join([*lines, *self.found.values()])


class _Worker:
    """Runs cases in a process of its own, which it starts when there is none."""

    def __init__(self, function: str, folder: str) -> None:
        self._arguments, self._folder = ("-m", "fuzz.worker", function), folder
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

    def run(self, numbers: list[int]) -> tuple[str, str, Outcome]:
        """Returns the function that was called, the call in words, and its outcome."""
        if self._process is None:
            self._start()
        with contextlib.suppress(BrokenPipeError):  # the process has ended: its output ends below, which is a finding
            self._process.stdin.write(f"{json.dumps(numbers)}\n")
            self._process.stdin.flush()
        function, text = json.loads(self._process.stdout.readline() or '["", "a call that could not be made"]')
        if line := self._process.stdout.readline():
            reply = json.loads(line)
            return function, text, Outcome(reply["kind"], [Finding(**entry) for entry in reply["findings"]])
        finding = _ended(function, *self.end())
        return function, text, Outcome(finding.kind, [finding])

    def end(self) -> tuple[int, str]:
        """Lets the process end by itself, so that a sanitizer can report; returns its exit code and its last output."""
        if self._process is None:
            return 0, ""
        with contextlib.suppress(BrokenPipeError):  # it has ended already: its exit code says how
            self._process.stdin.close()
        code = self._process.wait()
        self._errors.seek(0)
        self._process = None
        return code, self._errors.read()[-20000:]


def run(function: str, cases: int, seed: int = 0, only: Sequence[str] | None = None) -> Campaign:
    """Runs calls of a function ("": any) until one finds something, which is then made as small as it can be.

    ``cases``: their number. ``only``: kinds of findings to report.
    """
    campaign = Campaign()
    again = f"PYTHONPATH=tests python -m fuzz {function} --seed {seed} --cases {cases}"
    again += f" --only {shlex.join(only)}" if only else ""
    kinds: dict[str, type[Exception]] = {}  # of one class each, which hypothesis tells apart

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        worker = _Worker(function, folder)

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(st.binary(min_size=2 * _NUMBERS, max_size=2 * _NUMBERS))
        def examine(drawn: bytes) -> None:
            numbers = [int.from_bytes(drawn[i : i + 2]) for i in range(0, len(drawn), 2)]
            called, text, outcome = worker.run(numbers)
            campaign.counts[called][outcome.kind] += 1
            findings = [finding for finding in outcome.findings if only is None or finding.kind in only]
            for finding in findings:
                name = finding.signature
                campaign.found[name] = f"{name}\n  {finding.detail}\n  {text}\n  again: {again}"
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
