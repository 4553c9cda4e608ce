"""The parent's side of worker processes: runs cases in them, and stops those that hang."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from support.processes import Forked

from .outcomes import POISON, Finding
from .worker import is_sanitized

_TESTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Limits; a case takes milliseconds. Processor time, because other processes can delay this one; clock time, for a case
# that waits instead of computing.
PROCESSOR_SECONDS, CLOCK_SECONDS = 30.0, 120.0


@dataclass
class Report:
    """The outcome of a case.

    Attributes:
        seed: the case's seed, or None.
        choices: the case's choices, which are enough to recreate it.
        kind: the outcome's kind; "crash" or "hang" without an outcome.
    """

    seed: int | str | None
    choices: list[int]
    function: str
    source: str
    kind: str
    findings: list[Finding] = field(default_factory=list)


class Worker:
    """One process, started when needed. It forks again after a case ended its child. ``folder``: for its files."""

    def __init__(
        self,
        area: str,
        folder: str,
        processor_seconds: float = PROCESSOR_SECONDS,
        clock_seconds: float = CLOCK_SECONDS,
    ):
        self.area, self.folder = area, folder
        self.processor_seconds, self.clock_seconds = processor_seconds, clock_seconds
        self._process: subprocess.Popen[bytes] | Forked | None = None
        self._child = 0  # process id of the child that runs the cases
        self._errors: Any = None
        self._said_before = 0  # offset in _errors at which the child's words begin
        self._unread = b""

    def run(self, seed: int | str | None = None, choices: Sequence[int] | None = None) -> Report:
        """Runs the case of a seed, or of choices."""
        if self._process is None:
            self._start()
        request = {"seed": seed} if choices is None else {"choices": list(choices)}
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        report = Report(seed, list(choices or []), "?", "", "crash")
        begun = self._reply()
        if isinstance(begun, dict):
            report.choices, report.function, report.source = begun["choices"], begun["function"], begun["source"]
            done = self._reply()
            if isinstance(done, dict):
                report.kind = done["kind"]
                report.findings = [Finding(**entry) for entry in done["findings"]]
                return report
            begun = done
        report.kind, code = begun
        report.findings = [self._ended(report, code)]
        return report

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.stdin.close()  # the process then ends by itself, so that a sanitizer can report
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._process = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        variables = {
            "PYTHONFAULTHANDLER": "1",
            "FUZZ_FOLDER": self.folder,
            "OMP_WAIT_POLICY": "passive",
            "OPENBLAS_NUM_THREADS": "1",  # a process that has started threads cannot fork under ThreadSanitizer
            "MALLOC_PERTURB_": str(POISON ^ 0xFF),  # the C library fills new memory with its complement
        }
        arguments = "-m", "fuzz.worker", self.area
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        # Cases write to relative paths, too.
        how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "cwd": self.folder}
        if is_sanitized():
            path = [_TESTS, os.getcwd(), os.environ.get("PYTHONPATH", "")]  # the second has the sanitizer's library
            variables = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(filter(None, path))}
            self._process = subprocess.Popen([sys.executable, *arguments], env=variables, **how)
        else:
            self._process = Forked(*arguments, text=False, **how, **variables)
        self._unread = b""
        self._child = self._process.pid  # it imports
        self._wait_for_child()

    def _wait_for_child(self) -> None:
        ready = self._reply(clock_seconds=600)
        if not isinstance(ready, dict):
            raise RuntimeError(f"{self._process.args} does not start:\n{self._said()}")
        self._child, self._said_before = ready["ready"], self._errors.seek(0, os.SEEK_END)

    def _reply(self, clock_seconds: float | None = None) -> dict[str, Any] | tuple[str, int]:
        """Returns the next reply, or "crash" or "hang" and the exit code of the child."""
        end = time.monotonic() + (clock_seconds or self.clock_seconds)
        budget = self._processor_seconds() + (clock_seconds or self.processor_seconds)
        kind = "crash"
        while True:
            while b"\n" not in self._unread:
                ready, _, _ = select.select([self._process.stdout], [], [], 0.5)
                if ready:
                    data = os.read(self._process.stdout.fileno(), 1 << 16)
                    if not data:
                        return kind, self._process.wait()
                    self._unread += data
                elif kind == "hang":
                    self._signal(signal.SIGKILL)
                elif time.monotonic() > end or self._processor_seconds() > budget:
                    kind = "hang"
                    self._signal(signal.SIGABRT)  # makes it print its stack
            line, self._unread = self._unread.split(b"\n", 1)
            reply = json.loads(line)
            if "error" in reply:
                raise RuntimeError(f"the fuzzer itself has failed:\n{reply['error']}")
            if "ended" in reply:
                return kind, reply["ended"]
            if kind != "hang":  # otherwise it ended too late
                return reply

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self._child, number)

    def _processor_seconds(self) -> float:
        try:
            with open(f"/proc/{self._child}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def _ended(self, report: Report, code: int) -> Finding:
        said = self._said()
        if self._process.poll() is None:
            self._wait_for_child()
        else:
            self.stop()
        if report.kind == "hang":
            how = f"no end after {self.processor_seconds:g} s of processor time or {self.clock_seconds:g} s"
        else:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        sanitizer = re.search(r"ERROR: (\w+Sanitizer: [\w-]+)|(runtime error: .*)", said)
        frames = re.findall(r'File "[^"]*lora_ext/([^"]+)", line \d+ in (\w+)', said)
        place = sanitizer[0] if sanitizer else (":".join(frames[0]) if frames else "")
        signature = f"{report.kind}: {report.function}: {how if report.kind == 'crash' else ''} {place}"
        return Finding(report.kind, report.function, signature, f"{how}\n{said[-1500:]}")

    def _said(self) -> str:
        end = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(end - 20000, self._said_before))
        return self._errors.read().decode(errors="replace")
