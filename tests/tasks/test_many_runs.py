"""Processes of compare and sweep: an interrupt reaches each once, and their failures are reported."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.processes import Forked, run_python

from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.comparison import many_runs, processes
from lora_ext.tasks.comparison.many_runs import Run
from lora_ext.tasks.comparison.processes import _interrupt, in_process
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.trainer import Interrupted
from lora_ext.tasks.finetune.trainer_callbacks import StopOnInterrupt

pytestmark = pytest.mark.full


def test_an_interrupt_for_a_process_that_has_just_ended_is_none():
    class Ended:
        pid = 2**22  # beyond Linux's largest

        def is_alive(self) -> bool:
            return True  # the server that it was forked from has seen its end, and has not said so

    _interrupt(Ended())


def dies(on_progress) -> None:
    on_progress(0.5)
    print("so far")
    os._exit(3)


def fails(on_progress) -> None:
    raise RuntimeError("no luck")


def fills_the_disk(on_progress) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_in_a_process_or_its_log_raises_write_error(tmp_path: Path):
    with pytest.raises(WriteError, match=r"log.txt cannot be written: No space left on device"):
        in_process(fills_the_disk, log=tmp_path / "log.txt")
    with pytest.raises(WriteError, match=r"/dev/nowhere/log.txt cannot be written: No such file or directory"):
        in_process(fills_the_disk, log=Path("/dev/nowhere/log.txt"))


@pytest.mark.parametrize("times", [1, 2])
def test_a_server_that_is_killed_while_a_process_starts(times, tmp_path: Path, monkeypatch):
    """The server's memory is that of all imports, so that it is among the first to be killed."""
    start, lost = processes._start, []

    def loses_the_server(process):
        if len(lost) < times:
            lost.append(process)
            raise EOFError("unexpected EOF")  # of multiprocessing.forkserver, which waits for a number
        start(process)

    monkeypatch.setattr(processes, "_start", loses_the_server)
    if times == 1:
        assert in_process(answers, log=tmp_path / "log.txt") == 42
    else:
        with pytest.raises(TaskError, match=r"a run could not start: .* was ended twice, as when memory is short"):
            in_process(answers, log=tmp_path / "log.txt")
    assert not processes._PROCESSES


def answers(on_progress) -> int:
    return 42


def test_a_process_that_dies_is_reported_with_its_log(tmp_path: Path):
    parts = []
    how = "its process ended with exit code 3, after: so far"
    with pytest.raises(TaskError, match=rf"a run failed: {how}; .*log.txt has the rest"):
        in_process(dies, log=tmp_path / "log.txt", on_progress=parts.append)
    assert parts == [0.5]
    with pytest.raises(TaskError, match="a run failed: RuntimeError: no luck; .*log.txt has the rest"):
        in_process(fails, log=tmp_path / "log.txt")
    assert "Traceback" in (tmp_path / "log.txt").read_text()


def imports_and_hidden_objects(on_progress) -> tuple[set[str], int]:
    modules = {"lora_ext.tasks.finetune.run", "transformers.trainer", "matplotlib.figure"}
    return modules & {*sys.modules}, gc.get_freeze_count()


@pytest.mark.skipif(torch.cuda.is_available(), reason="processes are not forked where there is CUDA")
def test_a_process_begins_with_all_imports_and_its_garbage_collections_pass_them_over(tmp_path: Path):
    imports, hidden = in_process(imports_and_hidden_objects, log=tmp_path / "log.txt")
    assert len(imports) == 3 and hidden > 100_000


def counts_interrupts(run: Run, directory: Path, runs_here: int, on_progress) -> None:
    """Replaces a run; writes the number of SIGINT received up to one second after the first."""
    got = []
    signal.signal(signal.SIGINT, lambda *args: got.append(args))
    directory.mkdir(parents=True)
    (directory / "started").touch()
    while not got:
        time.sleep(0.01)
    time.sleep(1)
    (directory / "count").write_text(str(len(got)))
    raise KeyboardInterrupt


def goes_on(run: Run, directory: Path, runs_here: int, on_progress) -> None:
    """Replaces a run that does not end by itself."""
    directory.mkdir(parents=True)
    (directory / "started").write_text(str(os.getpid()))
    while True:
        on_progress(0.5)
        time.sleep(0.05)


def stops_with_a_checkpoint(run: Run, directory: Path, runs_here: int, on_progress) -> None:
    """Replaces a run; ends as a training does, or by itself after the first of three runs was asked to stop."""
    stop = StopOnInterrupt()
    directory.mkdir(parents=True)
    with stop.listening():
        (directory / "started").write_text(str(os.getpid()))
        while not stop.requested and not (directory.parent / "seed-0" / "checkpoint").exists():
            time.sleep(0.01)
        time.sleep(0.5)  # the time of a step, in which another signal may come
    if not stop.requested:
        raise TaskError("not asked to stop")
    (directory / "checkpoint").touch()
    raise Interrupted


INTERRUPTED = """
import sys
from pathlib import Path
import test_many_runs
from lora_ext.tasks.comparison import many_runs
from lora_ext.tasks.comparison.launch import Launch
from lora_ext.tasks.comparison.many_runs import Run
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.shared import sigterm

if __name__ == "__main__":
    many_runs._finetune = getattr(test_many_runs, sys.argv[3])
    runs = [Run("lora", Settings(seed=seed), "") for seed in range(3)]
    with sigterm.listening():
        many_runs.run_all(runs, Path(sys.argv[1]), "compare", Launch(jobs=int(sys.argv[2])))
"""


STARTED = """
import sys
from pathlib import Path
from lora_ext.tasks.comparison.processes import in_process

def answer(on_progress):
    return 42

if __name__ == "__main__":
    print(in_process(answer, log=Path(sys.argv[1])))
"""


@pytest.mark.full
def test_an_interrupt_during_the_imports_of_a_process_prints_nothing(tmp_path: Path):
    """A terminal's Ctrl-C in the first seconds of compare also reaches the server that forks the processes."""
    begins = "import os, signal, sys\n"
    begins += "if 'forkserver' in ' '.join(sys.orig_argv): os.kill(os.getpid(), signal.SIGINT)"
    (tmp_path / "sitecustomize.py").write_text(begins)
    (script := tmp_path / "script.py").write_text(STARTED)
    result = run_python(script, tmp_path / "log", PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    assert (result.stdout, "Traceback" in result.stderr) == ("42\n", False), result.stderr


def until_begun(process: Forked, out: Path, jobs: int) -> list[Path]:
    while len(begun := list(out.glob("runs/lora/*/started"))) < jobs:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return begun


@pytest.mark.parametrize(
    ("send", "jobs"),  # as a terminal does, and as a supervisor does
    [
        (os.killpg, 2),
        (os.kill, 1),
        pytest.param(os.killpg, 1, marks=pytest.mark.slow),
        pytest.param(os.kill, 2, marks=pytest.mark.slow),
    ],
)
def test_every_run_gets_one_interrupt_and_none_is_left_behind(tmp_path: Path, send, jobs: int):
    (script := tmp_path / "script.py").write_text(INTERRUPTED)
    arguments = [script, tmp_path, jobs, "counts_interrupts"]
    process = Forked(*arguments, start_new_session=True, stderr=subprocess.PIPE)
    until_begun(process, tmp_path, jobs)
    send(process.pid, signal.SIGINT)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in output
    counts = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/lora/*/count")}
    assert counts == {f"seed-{seed}": "1" for seed in range(jobs)}


@pytest.mark.parametrize("send", [os.killpg, os.kill])  # as Slurm does, and as a container's runtime does
def test_sigterm_stops_every_run_with_a_checkpoint(tmp_path: Path, send):
    (script := tmp_path / "script.py").write_text(INTERRUPTED)
    process = Forked(script, tmp_path, 2, "stops_with_a_checkpoint", start_new_session=True, stderr=subprocess.PIPE)
    begun = until_begun(process, tmp_path, 2)
    if send is os.killpg:  # runs have process groups of their own
        for path in begun:
            os.kill(int(path.read_text()), signal.SIGTERM)
    send(process.pid, signal.SIGTERM)
    time.sleep(0.1)
    send(process.pid, signal.SIGTERM)  # srun passes on what its step gets, too
    output = process.communicate(timeout=60)[1]
    assert process.returncode == -signal.SIGINT and "KeyboardInterrupt" in output
    logs = {path.parent.name: path.parent.with_name(f"{path.parent.name}.log").read_text() for path in begun}
    assert all((path.parent / "checkpoint").exists() for path in begun), logs
    assert len(list(tmp_path.glob("runs/lora/*/started"))) == 2


def test_sigterm_to_one_run_leaves_the_others(tmp_path: Path):
    (script := tmp_path / "script.py").write_text(INTERRUPTED)
    process = Forked(script, tmp_path, 3, "stops_with_a_checkpoint", stderr=subprocess.PIPE)
    begun = {path.parent.name: path for path in until_begun(process, tmp_path, 3)}
    os.kill(int(begun["seed-0"].read_text()), signal.SIGTERM)
    output = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and "3 of 3 runs failed" in output, output
    assert output.count("was ended by SIGTERM") == output.count("not asked to stop") / 2 > 0, output
    assert [path.parent.name for path in tmp_path.glob("runs/lora/*/checkpoint")] == ["seed-0"]


def test_runs_end_after_their_command_was_killed(tmp_path: Path):
    (script := tmp_path / "script.py").write_text(INTERRUPTED)
    process = Forked(script, tmp_path, 2, "goes_on", stderr=subprocess.PIPE)
    begun = until_begun(process, tmp_path, 2)
    process.kill()
    process.wait()
    for path in begun:
        while path.read_text() and is_alive(int(path.read_text())):
            time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_labels_that_would_share_a_directory_are_refused(tmp_path: Path):
    runs = [Run(label, Settings(), "") for label in ("r=1 q,v", "r=1 q;v")]
    with pytest.raises(TaskError, match="would share a directory"):
        many_runs.run_all(runs, tmp_path, "compare")
    assert many_runs.finished(runs[0], tmp_path) is None
