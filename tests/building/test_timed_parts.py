"""Tests scripts/timed_parts.py: parts get their time, are asked to stop before they are killed, and report."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import timed_parts  # noqa: E402
from timed_parts import FAILED, INTERRUPTED, NOT_FINISHED, NOT_RUN, PASSED, TIMED_OUT, Outcome, Part  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script"), pytest.mark.full]


@pytest.fixture(autouse=True)
def logs(tmp_path, monkeypatch):
    monkeypatch.setattr(timed_parts, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def part(name: str, limit: float = 100, least: float = 20, **more) -> Part:
    return Part(name, ["true"], limit, least, **more)


def test_time_is_kept_for_later_parts():
    later = [part("b"), part("c", least=30)]
    assert timed_parts.seconds_for(part("a"), later, 400) == 100
    assert timed_parts.seconds_for(part("a"), later, 110) == 60
    assert timed_parts.seconds_for(part("a"), later, 40) == 0
    parts = [part("a", 100, least=30), part("b", 40)]
    longer = timed_parts.stretched(parts, 2.5)
    assert [(p.name, p.limit_s, p.least_s) for p in longer] == [("a", 250, 30), ("b", 100, 20)]
    assert timed_parts.stretched(parts, 0.5) == parts


def test_a_part_that_fails_leaves_the_later_ones_their_time(capsys):
    now = [0.0]
    allotted = {}

    def fake_run(one: Part, limit: float) -> Outcome:
        if one.not_run:
            return Outcome(one.name, NOT_RUN, 0, "", one.not_run)
        allotted[one.name] = limit
        now[0] += limit  # uses all its time
        return Outcome(one.name, TIMED_OUT if one.name == "a" else PASSED, limit, "", "", failures=["test_one[x]"])

    parts = [part("a", 90), part("b", 90), part("c", 90), part("d", needs=("a",)), part("e", not_run="no tool")]
    parts += [part("f", needs=("e",)), part("g", needs=("f",)), part("h", needs=("earlier",))]
    done: list[str] = []
    outcomes = timed_parts.run_all(
        parts,
        210,
        done=lambda outcome: done.append(outcome.name),
        ready=lambda name: f"there is no {name}",
        clock=lambda: now[0],
        run_part=fake_run,
    )
    assert allotted == {"a": 90, "b": 20, "c": 20}
    assert [o.status for o in outcomes] == [TIMED_OUT, PASSED, PASSED] + [NOT_RUN] * 5
    reasons = ["a did not pass", "no tool", "e was not run", "f was not run", "there is no earlier"]
    assert [o.detail for o in outcomes[3:]] == reasons
    assert done == [p.name for p in parts]
    said = capsys.readouterr().out
    assert "a did not pass" in said and "failed: test_one[x]" in said


def run(code: str, limit: float = 60, **more) -> Outcome:
    return timed_parts.run(Part("p", [sys.executable, "-c", textwrap.dedent(code)], limit, 0, **more), limit)


def test_parts_are_processes_with_limits():
    good = run("print('===== 3 passed, 1 skipped in 2 s ====='); print('done')")
    assert (good.status, good.detail) == (PASSED, "3 passed, 1 skipped in 2 s")
    bad = run("print('WRONG'); raise SystemExit(99)")
    assert (bad.status, bad.detail) == (FAILED, "WRONG")
    # The grandchild ends, too; it would keep the pipe and the GPU.
    slow = run("import subprocess; subprocess.run(['sleep', '600'])", 6)
    assert slow.status == TIMED_OUT and slow.seconds < 30
    assert run("", 3).detail == "no time left"
    assert timed_parts.run(part("q", not_run="no tool"), 60).detail == "no tool"
    absent = timed_parts.run(Part("q", ["/no/such/program"], 60, 0), 60)
    assert absent.status == FAILED and "does not start: " in absent.detail and "/no/such/program" in absent.detail


@pytest.fixture
def impatient(monkeypatch):
    """Waits shortly after each signal."""
    quick = ((signal.SIGINT, 1.5), (signal.SIGTERM, 1.5), (signal.SIGKILL, 30.0))
    monkeypatch.setattr(timed_parts, "PATIENCE", quick)
    monkeypatch.setattr(timed_parts.interrupt, "__defaults__", (quick,))


IGNORES = """
    import signal, time
    for number in (signal.{}):
        signal.signal(number, signal.SIG_IGN)
    print("started", flush=True)
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            print("asked to stop, 2 passed", flush=True)
            raise SystemExit(0)
"""


@pytest.mark.parametrize(
    "ignored, said",
    [("SIGUSR1,", "asked to stop, 2 passed"), ("SIGINT,", "started"), ("SIGINT, signal.SIGTERM", "started")],
)
def test_a_process_is_asked_before_it_is_killed(impatient, ignored, said):
    outcome = run(IGNORES.format(ignored), 8)
    assert (outcome.status, outcome.detail) == (TIMED_OUT, said) and outcome.seconds < 30


@pytest.mark.parametrize("workers", [[], ["-n", "2"]], ids=["one process", "xdist"])
def test_pytest_says_what_failed_when_it_is_interrupted(tmp_path, workers):
    (tmp_path / "test_slow.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('shape', [(1, 2), (3, 4)], ids=str)\n"
        "def test_bad(shape): assert shape == 'x'\n"
        "def test_good(): pass\n"
        "@pytest.mark.parametrize('i', range(2))\n"
        "def test_hangs(i): time.sleep(600)\n"
    )
    command = [sys.executable, "-u", "-m", "pytest", "-v", "-p", "no:cacheprovider", *workers]
    command += [str(tmp_path / "test_slow.py"), "--rootdir", str(tmp_path)]
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        deadline = time.monotonic() + 120
        while log.read_text().count("FAILED") < 2 or "PASSED" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        before = log.read_text()
        timed_parts.interrupt(process)
    for text in (before, log.read_text()):  # before: as if it had been killed
        failed = {test.rpartition("::")[2] for test in timed_parts.failed_tests(text)}
        assert failed == {"test_bad[(1, 2)]", "test_bad[(3, 4)]"}
    assert timed_parts.telling_line(log.read_text()).startswith("2 failed, 1 passed")
    assert process.returncode == 2  # by SIGINT


def test_failures_are_read_from_a_log_that_was_cut():
    log = """
tests/ops/test_a.py::test_one[(1, 2)-bfloat16] FAILED            [ 12%]
tests/ops/test_a.py::test_two PASSED                             [ 13%]
[gw3] [ 14%] FAILED tests/ops/test_b.py::test_three[a b]
[gw1] [ 15%] PASSED tests/ops/test_b.py::test_four
ERROR tests/nn/test_c.py - ImportError: no module
FAILED tests/ops/test_a.py::test_one[(1, 2)-bfloat16] - AssertionError: 1 - 2
"""
    assert {*timed_parts.failed_tests(log)} == {
        "tests/nn/test_c.py",
        "tests/ops/test_a.py::test_one[(1, 2)-bfloat16]",
        "tests/ops/test_b.py::test_three[a b]",
    }


def test_ctrl_c_ends_the_part_and_what_was_found_is_written(impatient, tmp_path):
    """Also in a background job of a shell, where Ctrl-C is ignored by default."""
    code = f"""
        import signal, sys
        sys.path.insert(0, {str(ROOT / "scripts")!r})
        import gpu_check, timed_parts
        from pathlib import Path
        timed_parts.LOGS = Path({str(tmp_path)!r})
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, gpu_check.stop)
        sleep = [sys.executable, "-c", "import time; print('3 passed', flush=True); time.sleep(600)"]
        parts = [timed_parts.Part(name, sleep, 600, 0) for name in ("first", "second")]
        outcomes = timed_parts.run_all(parts, 1200, lambda o: print("done", o.name, o.status, flush=True))
        print("exit", timed_parts.exit_status(parts, outcomes), flush=True)
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        command = [sys.executable, "-c", textwrap.dedent(code)]
        ignores = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=ignores)
        deadline = time.monotonic() + 60
        while not (tmp_path / "first.log").exists() or "passed" not in (tmp_path / "first.log").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(number)
        said, _ = process.communicate(timeout=90)
        assert f"done first {INTERRUPTED}" in said and "second" not in said and "exit 1" in said, said
        (tmp_path / "first.log").unlink()


# --- sanitizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, code, status",
    [
        ("9 cases, 0 wrong\n========= ERROR SUMMARY: 0 errors", 0, PASSED),
        ("not finished: 5 of 9 cases in 40 s, 0 wrong\n========= ERROR SUMMARY: 0 errors", 75, NOT_FINISHED),
        ("", None, NOT_FINISHED),  # torch was still being imported
        ("========= Invalid __global__ read of size 4 bytes", None, FAILED),
        ("========= Error: Race reported between Write access at f and Read access at g", 75, FAILED),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 99, FAILED),
        ("(1, 2) bfloat16: error 3e-1, WRONG", None, FAILED),
        ("Error: Device not supported", 1, NOT_RUN),
        ("Traceback", 1, FAILED),
    ],
)
def test_a_sanitizer_without_time_is_not_finished(text, code, status):
    assert timed_parts.status_of(part("memcheck", sanitizer=True), code, text) == status


def test_sanitized_ops_have_a_budget_beside_the_imports(monkeypatch, capsys):
    import sanitize_ops

    now = iter(range(0, 1000, 30))
    monkeypatch.setattr(sanitize_ops.time, "monotonic", lambda: next(now))
    for options, error, status, said in (
        (["--seconds", "40"], 0.0, timed_parts.STOPPED_IN_TIME, "not finished: 1 of 9 cases in 40 s, 0 wrong"),
        (["--seconds", "40"], 1.0, 1, "1 wrong"),
        ([], 0.0, 0, "9 cases, 0 wrong"),
    ):
        monkeypatch.setattr(sanitize_ops, "worst_error", lambda shape, dtypes, error=error: error)
        assert sanitize_ops.main(options) == status and said in capsys.readouterr().out


def test_exit_status():
    def status(*outcomes: tuple[str, str, bool]) -> int:
        done = [Outcome(name, status, 0, "", "", optional=optional) for name, status, optional in outcomes]
        return timed_parts.exit_status([part(name) for name, _, _ in outcomes], done)

    assert status(("build", PASSED, False), ("memcheck", NOT_RUN, True), ("racecheck", NOT_FINISHED, True)) == 0
    for bad in ((FAILED, False), (TIMED_OUT, False), (NOT_RUN, False), (FAILED, True), (INTERRUPTED, False)):
        assert status(("build", PASSED, False), ("x", *bad)) == 1
    assert timed_parts.exit_status([part("a"), part("b")], [Outcome("a", PASSED, 1, "", "")]) == 1  # stopped after a
