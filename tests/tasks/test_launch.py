"""Runs of compare and sweep side by side on devices, and as jobs of submitit: of this machine and of a fake Slurm."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_slurm import FakeSlurm
from support.optional import submitit
from support.processes import environment

from lora_ext.cli import main
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison import compare, launch, pools, processes, submitit_jobs, sweep
from lora_ext.tasks.comparison.launch import Launch
from lora_ext.tasks.comparison.pools import LocalPool
from lora_ext.tasks.comparison.submitit_jobs import SubmititPool

pytestmark = [pytest.mark.full, pytest.mark.cpu_only("starts processes")]

HERE = Launch("submitit", more=("cluster=local",))


# --- what is refused before anything starts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--jobs", "0"], "argument --jobs: '0', want an integer of at least 1"),
        (["--launcher", "ray"], "argument --launcher: invalid choice: 'ray' .*local.*submitit"),
        (["--partition", "gpu"], "--partition goes with --launcher submitit"),
        (["--launcher-set", "mem_gb=3"], "--launcher-set goes with --launcher submitit"),
        (["--launcher", "submitit"], 'Could not detect "srun".* On one machine use --jobs; --launcher-set cluster=l'),
        (["--gpus-per-run", "2"], "--gpus-per-run is 2, want 0 or 1: a run takes one device"),
        (["--time-limit", "0"], "argument --time-limit: '0', want an integer of at least 1"),
        (["--launcher-set", "mem"], "--launcher-set mem: want name=value, such as slurm_account=nlp"),
        (["--launcher-set", "nodes=2"], "nodes=2: a run is one process, and --jobs says how many run at once"),
        (["--launcher-set", "slurm_time=3"], "slurm_time=3: give --time-limit instead"),
        (["--launcher-set", "mem_gb=much"], '--launcher-set .*Parameter "mem_gb" expected type'),
        (["--launcher-set", "slurm_acount=nlp"], "Unknown argument 'acount' for executor 'slurm'"),
        (["--launcher-set", "cluster=pbs"], "--launcher-set cluster=pbs: want slurm or local"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "sweep"])
def test_mistakes_are_named_before_the_model_is_loaded(tmp_path: Path, capsys, monkeypatch, command, options, message):
    monkeypatch.setenv("PATH", str(tmp_path))  # no srun
    if options[0] in ("--gpus-per-run", "--launcher-set") and options[1] != "mem_gb=3":
        options = ["--launcher", "submitit", "--launcher-set", "cluster=local", *options]
    out = tmp_path / "out"
    try:
        status = main([command, "--model", "nowhere", "--out", str(out), *options])
    except SystemExit as error:  # raised by argparse
        status = error.code
    assert status == 2 and not out.exists()
    assert re.search(message, capsys.readouterr().err, re.S)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TaskError, match=r"--launcher submitit needs submitit: pip install .*\[submitit\]"):
        HERE.check(tmp_path)


def test_a_directory_that_no_other_machine_sees_is_refused(tmp_path: Path, monkeypatch):
    FakeSlurm(tmp_path / "slurm", monkeypatch)
    Launch("submitit").check(tmp_path / "out")
    with pytest.raises(TaskError, match="--out /dev/shm/out is in this machine's memory .tmpfs at /dev/shm.; choose"):
        Launch("submitit").check(Path("/dev/shm/out"))
    HERE.check(Path("/dev/shm/out"))
    with pytest.raises(TaskError, match="Slurm gives a meaning to % in paths"):
        Launch("submitit").check(tmp_path / "100%")


def test_more_jobs_than_devices_are_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(launch, "cuda_devices", lambda: ["2", "5"])
    Launch(jobs=2).check(tmp_path)
    with pytest.raises(TaskError, match=r"--jobs is 3, but a run takes a CUDA device, and there is 2 \(2, 5\); want"):
        Launch(jobs=3).check(tmp_path)


def test_options_are_repeated_by_the_command_that_resumes():
    wanted = Launch("submitit", 3, "gpu", 1, 60, ("mem_gb=32",))
    said = "--launcher submitit --jobs 3 --partition gpu --gpus-per-run 1 --time-limit 60 --launcher-set mem_gb=32"
    assert wanted.arguments() == said.split()
    assert Launch().arguments() == []


# --- processes of this machine ----------------------------------------------------------------------------------------


def sees(number: int, on_progress: Callable[[float], None]) -> tuple[str | None, int, float, float]:
    """Returns the devices and threads of the process, and when it began and ended."""
    begin = time.time()
    time.sleep(0.2)
    return os.environ.get("CUDA_VISIBLE_DEVICES"), torch.get_num_threads(), begin, time.time()


def test_every_run_has_a_device_of_its_own(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pools, "cuda_devices", lambda: ["GPU-a", "3"])
    monkeypatch.setattr(processes.torch.cuda, "is_available", lambda: True)  # so processes are not forked
    pool = LocalPool(2)
    with ThreadPoolExecutor(2) as threads:
        calls = [threads.submit(pool.call, sees, n, log=tmp_path / f"{n}.log", threads=1) for n in range(3)]
        seen = [call.result() for call in calls]
    assert {device for device, *_ in seen} == {"GPU-a", "3"}
    for device in ("GPU-a", "3"):  # one after the other
        times = sorted(one[2:] for one in seen if one[0] == device)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(times))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_devices_have_the_names_of_the_environment(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert processes.cuda_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, MIG-x")
    assert processes.cuda_devices() == ["4", "MIG-x"]


def test_two_commands_do_not_make_the_same_run(tmp_path: Path):
    with (tmp_path / "log").open("a") as file:
        processes.fcntl.flock(file, processes.fcntl.LOCK_EX)
        outcome = processes.outcome_of(sees, (0,), tmp_path / "log", print)
    with pytest.raises(TaskError, match="another process works on it already: it writes .*log"):
        processes.value_of(outcome, tmp_path / "log")


# --- jobs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(submitit_jobs, "_POLL", 0.05)
    monkeypatch.setattr(submitit.SlurmJob.watcher, "_delay_s", 0.5)
    monkeypatch.setattr(submitit.core.core.Job, "_results_timeout_s", 0)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch) -> Iterator[FakeSlurm]:
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    yield slurm
    slurm.end()


def works(how: str, directory: Path, on_progress: Callable[[float], None]) -> Any:
    """Stands for a run; ``how`` says how it ends."""
    with (directory / "calls").open("a") as file:
        file.write(f"{os.getpid()}\n")
    on_progress(0.5)
    print("working")
    if how == "waits":
        try:
            while not (directory / "enough").exists():
                time.sleep(0.05)
        except KeyboardInterrupt:
            (directory / "checkpoint").touch()
            raise
    if how == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "fails":
        raise RuntimeError("no luck")
    if how == "mistake":
        raise TaskError("the data is not here")
    return how, os.environ["CUDA_VISIBLE_DEVICES"], torch.get_num_threads()


def start(pool: SubmititPool, how: str, top: Path, **more: Any) -> Any:
    return pool.call(works, how, top, log=top / "run.log", threads=1, **more)


def call_in_thread(*args: Any, **more: Any) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []

    def call() -> None:
        try:
            result.append(start(*args, **more))
        except BaseException as error:
            result.append(error)

    (thread := threading.Thread(target=call)).start()
    return thread, result


def until(there: Callable[[], Any], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_job_of_this_machine(tmp_path: Path):
    pool = SubmititPool(HERE, tmp_path, 3)
    assert (pool.at_once, pool.runs_here) == (3, 3)
    assert start(pool, "returns", tmp_path) == ("returns", "", 1)
    assert "working" in (tmp_path / "run.log").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"jobs", "run.log", "calls"}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "is killed",
            r"job \d+ has ended without a result \(state: .*\), after: working; .*run.log has the",
        ),
        ("fails", "a run failed: RuntimeError: no luck; .*run.log has the rest"),
        ("mistake", "the data is not here"),
    ],
)
def test_what_a_job_reports(slurm: FakeSlurm, tmp_path: Path, how, message):
    with pytest.raises(TaskError, match=message):
        start(SubmititPool(Launch("submitit"), tmp_path, 1), how, tmp_path)


def test_a_job_of_slurm(slurm: FakeSlurm, tmp_path: Path):
    wanted = Launch("submitit", 2, "gpu", 1, 90, ("mem_gb=3", "slurm_account=nlp", 'slurm_setup=["export A=1"]'))
    wanted.check(tmp_path)
    parts: list[float] = []
    pool = SubmititPool(wanted, tmp_path, 5)
    assert (pool.at_once, pool.runs_here) == (2, 1)
    assert start(pool, "returns", tmp_path, on_progress=parts.append) == ("returns", "0", 1)
    script = slurm.script(*slurm.jobs())
    for line in ("partition=gpu", "gpus-per-node=1", "time=90", "mem=3GB", "account=nlp", "cpus-per-task=1", "nodes=1"):
        assert line == "nodes=1" or f"#SBATCH --{line}\n" in script, line
    assert "\nexport A=1\n" in script and parts


def test_sbatch_refuses(slurm: FakeSlurm, tmp_path: Path):
    slurm.refuse()
    with pytest.raises(TaskError, match="submitit: .*sbatch: error: invalid partition specified"):
        start(SubmititPool(Launch("submitit", partition="gqu"), tmp_path, 1), "returns", tmp_path)


def test_a_machine_without_the_directory(slurm: FakeSlurm, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # as without the package: the job ends before it writes a log
    with pytest.raises(TaskError, match=r"ended without a result .*ModuleNotFound.*does its machine see .*/jobs\?"):
        start(SubmititPool(Launch("submitit"), tmp_path, 1), "returns", tmp_path)


def test_an_end_lets_jobs_write_checkpoints(slurm: FakeSlurm, tmp_path: Path):
    ending = threading.Event()
    thread, result = call_in_thread(SubmititPool(Launch("submitit"), tmp_path, 1), "waits", tmp_path, ending=ending)
    until((tmp_path / "calls").exists)
    ending.set()
    thread.join(60)
    assert isinstance(result[0], KeyboardInterrupt) and (tmp_path / "checkpoint").exists()
    assert not any(map(slurm.is_cancelled, slurm.jobs()))
    assert not list(tmp_path.glob("run.[jps]*"))


def test_an_end_cancels_a_job_in_the_queue(slurm: FakeSlurm, tmp_path: Path):
    slurm.fill()
    ending = threading.Event()
    thread, result = call_in_thread(SubmititPool(Launch("submitit"), tmp_path, 1), "waits", tmp_path, ending=ending)
    until((tmp_path / "run.job").exists)
    ending.set()
    thread.join(60)
    assert isinstance(result[0], KeyboardInterrupt) and slurm.is_cancelled(*slurm.jobs())


def test_the_next_command_waits_for_the_job_of_one_that_was_killed(slurm: FakeSlurm, tmp_path: Path):
    """A thread that is left alone stands for the killed command."""
    killed = SubmititPool(Launch("submitit"), tmp_path, 1)
    killed._wait = lambda *args: (_ for _ in ()).throw(SystemExit)
    with pytest.raises(SystemExit):
        start(killed, "waits", tmp_path)
    until((tmp_path / "calls").exists)
    with pytest.raises(TaskError, match=r"job \d+ still works in .* with other options; end it: scancel"):
        start(SubmititPool(Launch("submitit"), tmp_path, 1), "returns", tmp_path)
    thread, result = call_in_thread(SubmititPool(Launch("submitit"), tmp_path, 1), "waits", tmp_path)
    time.sleep(0.5)
    (tmp_path / "enough").touch()
    thread.join(60)
    assert result == [("waits", "", 1)] and len(slurm.jobs()) == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_overwrite_spares_the_jobs_of_a_command_that_was_killed(slurm: FakeSlurm, tmp_path: Path, monkeypatch):
    """Two jobs would write into one directory: one of the first command, which the second no longer knows."""
    out = tmp_path / "out"
    slurm.fill()
    files = submitit_jobs._Files(out / "runs/lora/seed-0.log")
    job = SubmititPool(Launch("submitit"), out, 1)._submit("work", files, "", 1)
    (out / "compare-settings.json").write_text("{}")
    (out / "sweep-settings.json").write_text("{}")
    message = rf"would remove what job {job.job_id} writes in .*lora; --resume waits .*scancel {job.job_id} "
    with pytest.raises(TaskError, match=message):
        compare.compare(["lora"], [0], {}, out, overwrite=True)
    with pytest.raises(TaskError, match=message):
        sweep.sweep([1], ["q"], [0], {}, out, overwrite=True)
    with monkeypatch.context() as patch, pytest.raises(TaskError, match="seed-0.job tells of a job that may still"):
        patch.setattr(launch.importlib.util, "find_spec", lambda name: None)
        launch.check_no_jobs(out)
    job.cancel()
    launch.check_no_jobs(out)


def test_a_job_that_is_preempted_is_started_again(tmp_path: Path, monkeypatch):
    jobs = []
    submit = submitit.AutoExecutor.submit
    monkeypatch.setattr(submitit.AutoExecutor, "submit", lambda *args: jobs.append(submit(*args)) or jobs[-1])
    thread, result = call_in_thread(SubmititPool(HERE, tmp_path, 1), "waits", tmp_path)
    until((tmp_path / "calls").exists)
    os.kill(int((tmp_path / "calls").read_text()), signal.SIGUSR2)  # as Slurm does before it takes the machine
    until(lambda: len((tmp_path / "calls").read_text().splitlines()) == 2)
    (tmp_path / "enough").touch()
    thread.join(60)
    assert result == [("waits", "", 1)]


def test_the_record_of_a_job_can_be_damaged(slurm: FakeSlurm, tmp_path: Path):
    pool, files = SubmititPool(Launch("submitit"), tmp_path, 1), submitit_jobs._Files(tmp_path / "run.log")
    for content in ("{", json.dumps({"cluster": "slurm", "id": "77", "work": ""}), json.dumps({"id": 1})):
        files.job.write_text(content)
        assert pool._job_before(files, "") is None


# --- whole commands ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from support import tiny_classifier  # here: every job imports this file, and Transformers takes seconds

    top = tmp_path_factory.mktemp("inputs")
    options = ["--model", tiny_classifier.save_model(top / "model"), "--max-length", "32", "--test-split", "0.3"]
    options += ["--data", tiny_classifier.save_reviews(top / "reviews.csv", tiny_classifier.reviews(60))]
    options += ["--methods", "lora:r=2", "--seeds", "0,1", "--threads", "1"]
    return [sys.executable, "-m", "lora_ext", "compare", *map(str, options)]


def weights_of(out: Path) -> dict[str, bytes]:
    files = sorted(out.glob("runs/*/*/adapter/adapter_model.safetensors"))
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


JOBS = ["--launcher", "submitit", "--launcher-set", "cluster=local"]


@pytest.mark.slow
def test_jobs_make_the_bits_of_runs_one_after_the_other(command: list[str], tmp_path: Path):
    for name, more in {"alone": [], "jobs": JOBS}.items():
        done = subprocess.run([*command, *more, "--out", tmp_path / name], env=environment(), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    assert len(weights_of(tmp_path / "alone")) == 2
    assert weights_of(tmp_path / "alone") == weights_of(tmp_path / "jobs")
    alone, jobs = (json.loads((tmp_path / name / "compare.json").read_text()) for name in ("alone", "jobs"))
    assert alone["methods"][0]["accuracy"] == jobs["methods"][0]["accuracy"]
    assert alone["machine"] == jobs["machine"] and alone["machines"] == jobs["machines"]
    assert [result["methods"][0]["runs_at_once"] for result in (alone, jobs)] == [1, 2]
    assert set(JOBS) < set(jobs["command"])


@pytest.mark.slow
def test_ctrl_c_ends_the_jobs_and_resume_continues_them(command: list[str], tmp_path: Path):
    longer, out = [*command, "--epochs", "60"], tmp_path / "out"
    process = subprocess.Popen(
        [*longer, *JOBS, "--out", out],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    logs = [out / "runs" / "lora-r=2" / f"seed-{seed}.log" for seed in (0, 1)]
    try:
        begun = lambda: all(log.is_file() and "finetune: " in log.read_text() for log in logs)  # noqa: E731
        until(lambda: process.poll() is not None or begun(), seconds=600)
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 130, said
    assert f"to continue: lora-ext compare --resume --out {out} {' '.join(JOBS)}" in said
    assert len(list(out.glob("runs/*/seed-*/checkpoints/*"))) >= 2 and not weights_of(out)
    again = [*command[:4], "--resume", *JOBS, "--out", out]
    assert subprocess.run(again, env=environment()).returncode == 0
    assert subprocess.run([*longer, "--out", tmp_path / "whole"], env=environment()).returncode == 0
    assert len(weights_of(out)) == 2 and weights_of(out) == weights_of(tmp_path / "whole")
