"""Runs the parts of a check: processes with time limits, interrupted so that they still say what they found."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu_check"

PASSED, FAILED, TIMED_OUT, INTERRUPTED = "passed", "failed", "out of time", "interrupted"
NOT_RUN = "not run"
NOT_FINISHED = "not finished"  # a sanitizer that found nothing in its time

LEAST_SECONDS = 5.0  # a part is not started with less
# How long a process has to end after each signal. pytest prints its summary after SIGINT.
PATIENCE = ((signal.SIGINT, 15.0), (signal.SIGTERM, 5.0), (signal.SIGKILL, 60.0))
STOPPED_IN_TIME = 75  # exit status of a part that its own time budget ended (os.EX_TEMPFAIL)


@dataclass
class Part:
    name: str
    command: list[str]
    limit_s: float  # maximum
    least_s: float  # reserved for it while earlier parts run
    environment: dict[str, str] = field(default_factory=dict)
    not_run: str = ""  # why it cannot run here
    needs: tuple[str, ...] = ()  # parts that must pass first
    measures: str = ""  # file in LOGS to which it writes its figures as soon as it has them
    sanitizer: bool = False
    optional: bool = False  # the check passes without it


@dataclass
class Outcome:
    name: str
    status: str
    seconds: float
    command: str
    detail: str  # the last informative line of its output, or the reason
    failures: list[str] = field(default_factory=list)  # the tests that failed
    optional: bool = False


def shown(command: list[str]) -> str:
    """Formats a command without this machine's paths."""
    return " ".join("python" if word == sys.executable else word.replace(f"{ROOT}/", "") for word in command)


def seconds_for(part: Part, later: list[Part], remaining_s: float) -> float:
    """The part's share of the remaining time: at most its limit, without the minimum of later parts."""
    return max(min(part.limit_s, remaining_s - sum(other.least_s for other in later)), 0.0)


def stretched(parts: list[Part], factor: float) -> list[Part]:
    """Returns the parts with limits that are longer by a factor; a smaller one than 1 leaves them as they are."""
    return [replace(part, limit_s=part.limit_s * max(factor, 1.0)) for part in parts]


# --- one part ---------------------------------------------------------------------------------------------------------


def interrupt(process: subprocess.Popen, patience: tuple[tuple[signal.Signals, float], ...] = PATIENCE) -> None:
    """Ends a process and its group: asks first, then insists."""
    for number, seconds in patience:
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(seconds)
            break
        except subprocess.TimeoutExpired:
            continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # children that outlived it would keep the GPU
    except ProcessLookupError:
        return


def grace(limit_s: float) -> float:
    """Seconds of the limit that are kept for ending the process."""
    return min(sum(seconds for _, seconds in PATIENCE[:2]), limit_s / 4)


def run(part: Part, limit_s: float) -> Outcome:
    """Runs a part. KeyboardInterrupt: its process was ended first; the outcome is the exception's argument."""

    def outcome(status: str, seconds: float, detail: str, failures: list[str] | None = None) -> Outcome:
        return Outcome(part.name, status, seconds, shown(part.command), detail, failures or [], part.optional)

    if part.not_run:
        return outcome(NOT_RUN, 0.0, part.not_run)
    if limit_s < LEAST_SECONDS:
        return outcome(TIMED_OUT, 0.0, "no time left")
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{part.name}.log"
    if part.measures:
        (LOGS / part.measures).unlink(missing_ok=True)
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    # ninja comes with pip next to the interpreter, which need not be on PATH.
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = os.environ | {"PYTHONPATH": search_path, "PATH": programs, "PYTHONUNBUFFERED": "1"}
    begin, code, stopped = time.monotonic(), None, False
    with log.open("w") as output:
        # In a new process group, so that at the limit the part's children end, too.
        try:
            process = subprocess.Popen(
                part.command,
                cwd=ROOT,
                env=environment | part.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:  # a program that is not executable: the other parts run all the same
            return outcome(FAILED, 0.0, f"does not start: {error}")
        try:
            code = process.wait(limit_s - grace(limit_s))
        except subprocess.TimeoutExpired:
            interrupt(process)
        except KeyboardInterrupt:
            interrupt(process)
            stopped = True
    seconds, text = time.monotonic() - begin, log.read_text(errors="replace")
    result = outcome(status_of(part, code, text), seconds, telling_line(text), failed_tests(text))
    if stopped:
        result.status = INTERRUPTED
        raise KeyboardInterrupt(result)
    if result.status == NOT_RUN:
        result.detail = "compute-sanitizer does not support this machine"
    return result


def status_of(part: Part, code: int | None, text: str) -> str:
    """code: the exit status; None: the part was interrupted."""
    if part.sanitizer:
        if "Device not supported" in text:  # a machine that hides the debugging interface
            return NOT_RUN
        if code is None or code == STOPPED_IN_TIME:
            return FAILED if sanitizer_errors(text) else NOT_FINISHED
    return TIMED_OUT if code is None else PASSED if code == 0 else FAILED


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
    summaries = [line for line in lines if re.search(summary, line)]
    return (summaries or lines or [""])[-1].strip("= ")


# --- all parts --------------------------------------------------------------------------------------------------------


def missing_need(part: Part, outcomes: list[Outcome], ready: Callable[[str], str]) -> str:
    """Returns why the part cannot run: a part that it needs did not pass, or was not run now nor before."""
    status = {outcome.name: outcome.status for outcome in outcomes}
    for name in part.needs:
        if name not in status:
            if reason := ready(name):
                return reason
        elif status[name] == NOT_RUN:
            return f"{name} was not run"
        elif status[name] != PASSED:
            return f"{name} did not pass"
    return ""


def run_all(
    parts: list[Part],
    budget_s: float,
    done: Callable[[Outcome], None] = lambda outcome: None,
    ready: Callable[[str], str] = lambda name: "",
    clock: Callable[[], float] = time.monotonic,
    run_part: Callable[[Part, float], Outcome] = run,
) -> list[Outcome]:
    """Runs the parts one after the other; stops at Ctrl-C.

    done: called with every outcome at once. ready: says why a part that is not run now has not done its work before.
    """
    end = clock() + budget_s
    outcomes: list[Outcome] = []
    for number, part in enumerate(parts):
        stopped = False
        if reason := "" if part.not_run else missing_need(part, outcomes, ready):
            outcome = Outcome(part.name, NOT_RUN, 0.0, shown(part.command), reason, optional=part.optional)
        else:
            later = [other for other in parts[number + 1 :] if not other.not_run]
            try:
                outcome = run_part(part, seconds_for(part, later, end - clock()))
            except KeyboardInterrupt as interruption:
                stopped = True
                if not interruption.args:
                    break
                outcome = interruption.args[0]
        outcomes.append(outcome)
        print(f"{outcome.name:10} {outcome.status:12} {outcome.seconds:6.1f} s  {outcome.detail}", flush=True)
        for test in outcome.failures:
            print(f"{'':10} failed: {test}", flush=True)
        done(outcome)
        if stopped:
            break
    return outcomes


def exit_status(parts: list[Part], outcomes: list[Outcome]) -> int:
    """Returns 0 if every part passed, or could not run here and is optional, or is a sanitizer that found nothing."""
    good = {outcome.name for outcome in outcomes if outcome.status in (PASSED, NOT_FINISHED)}
    good |= {outcome.name for outcome in outcomes if outcome.status == NOT_RUN and outcome.optional}
    return 0 if all(part.name in good for part in parts) else 1
