"""Starts the runs of compare and sweep: side by side on this machine, or as jobs by submitit."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_ext._common.install_hint import install_hint
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.processes import cuda_devices

LAUNCHERS = ("local", "submitit")
_TIME_LIMIT = 24 * 60  # minutes; submitit's default is 5

_OPTIONS = {  # submitit's parameters that an option sets, or that a run decides
    "timeout_min": "--time-limit",
    "slurm_time": "--time-limit",
    "slurm_partition": "--partition",
    "gpus_per_node": "--gpus-per-run",
    "slurm_gpus_per_node": "--gpus-per-run",
    "slurm_gpus_per_task": "--gpus-per-run",
    "cpus_per_task": "--threads",
    "slurm_cpus_per_task": "--threads",
}
_ONE = ("nodes", "tasks_per_node", "slurm_nodes", "slurm_ntasks_per_node", "slurm_array_parallelism")
_OF_CONSTRUCTOR = ("slurm_python", "slurm_max_num_timeout")


@dataclass(frozen=True)
class Launch:
    """Tells where the runs of a comparison are executed.

    Attributes:
        launcher: "local", for processes of this machine, or "submitit", for jobs.
        jobs: most runs at once; None for one after the other on this machine, or for all as jobs.
        partition: Slurm's partition.
        gpus_per_run: 0 or 1.
        time_limit: minutes of a job, which then continues in another one.
        more: further parameters of submitit, each ``name=value``.
    """

    launcher: str = "local"
    jobs: int | None = None
    partition: str | None = None
    gpus_per_run: int | None = None
    time_limit: int | None = None
    more: tuple[str, ...] = ()

    def at_once(self, number: int) -> int:
        """Returns how many of so many runs are started together.

        On this machine that does not depend on ``number``: neither do the threads of a run, nor its bits.
        """
        return self.jobs or 1 if self.launcher == "local" else min(number, self.jobs or number)

    def on_this_machine(self, number: int) -> int:
        """Returns how many of so many runs share this machine."""
        return self.at_once(number) if self.launcher == "local" or self.cluster == "local" else 1

    @property
    def cluster(self) -> str:
        """submitit's name of what runs the jobs: Slurm, or processes of this machine to try it out."""
        return str(self.parameters().get("cluster", "slurm"))

    def parameters(self) -> dict[str, Any]:
        """Returns ``more`` by name; a value is JSON, or else a text."""
        return {name: _value(text) for name, _, text in (item.partition("=") for item in self.more)}

    def arguments(self) -> list[str]:
        """Returns the options of the command line."""
        given = {"--launcher": self.launcher if self.launcher != "local" else None, "--jobs": self.jobs}
        given |= {"--partition": self.partition, "--gpus-per-run": self.gpus_per_run, "--time-limit": self.time_limit}
        listed = [part for option, value in given.items() if value is not None for part in (option, str(value))]
        return listed + [part for item in self.more for part in ("--launcher-set", item)]

    def check(self, out: Path) -> None:
        """Raises TaskError for what cannot be launched; writes nothing into ``out``."""
        if self.launcher == "local":
            self._check_local()
        else:
            self._check_submitit(out)

    def _check_local(self) -> None:
        given = {"--partition": self.partition, "--gpus-per-run": self.gpus_per_run, "--time-limit": self.time_limit}
        given["--launcher-set"] = self.more or None
        for option, value in given.items():
            if value is not None:
                raise TaskError(f"{option} goes with --launcher submitit")
        devices = cuda_devices()
        if devices and (self.jobs or 1) > len(devices):
            raise TaskError(
                f"--jobs is {self.jobs}, but a run takes a CUDA device, and there is {len(devices)} "
                f"({', '.join(devices)}); want --jobs {len(devices)}"
            )

    def _check_submitit(self, out: Path) -> None:
        if importlib.util.find_spec("submitit") is None:
            raise TaskError(f"--launcher submitit needs submitit: {install_hint('submitit')}")
        if self.gpus_per_run not in (None, 0, 1):
            raise TaskError(f"--gpus-per-run is {self.gpus_per_run}, want 0 or 1: a run takes one device")
        for item in self.more:
            name, equals, _ = item.partition("=")
            if not (equals and name.isidentifier()):
                raise TaskError(f"--launcher-set {item}: want name=value, such as slurm_account=nlp")
            if name in _OPTIONS:
                raise TaskError(f"--launcher-set {item}: give {_OPTIONS[name]} instead")
            if name in _ONE:
                raise TaskError(f"--launcher-set {item}: a run is one process, and --jobs says how many run at once")
        from lora_ext.tasks.comparison.submitit_jobs import check

        check(self, out)

    def constructor(self) -> dict[str, Any]:
        """Returns the arguments of submitit's AutoExecutor except the folder."""
        given = {name: value for name, value in self.parameters().items() if name in _OF_CONSTRUCTOR}
        return {"cluster": self.cluster, **given}

    def updates(self, threads: int) -> dict[str, Any]:
        """Returns the arguments of ``update_parameters`` for a run with so many threads."""
        more = {name: one for name, one in self.parameters().items() if name not in ("cluster", *_OF_CONSTRUCTOR)}
        given = {"slurm_partition": self.partition, "gpus_per_node": self.gpus_per_run}
        given["timeout_min"] = _TIME_LIMIT if self.time_limit is None else self.time_limit
        return {"name": "lora-ext", "cpus_per_task": threads, **given, **more}


def check_no_jobs(out: Path) -> None:
    """Raises TaskError if jobs that an earlier command submitted may still write in ``out``."""
    if not (records := [*out.glob("*.job"), *out.glob("runs/*/*.job")]):
        return
    if importlib.util.find_spec("submitit") is None:
        raise TaskError(
            f"--overwrite: {records[0]} tells of a job that may still work, and without submitit nobody can ask Slurm: "
            f"{install_hint('submitit')}; or remove that file if the job has ended"
        )
    from lora_ext.tasks.comparison import submitit_jobs

    submitit_jobs.check_no_jobs(out, records)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
