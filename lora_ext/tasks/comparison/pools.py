"""Executes runs in processes of this machine, or in jobs of submitit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from queue import Queue
from typing import Any, Protocol

import torch

from lora_ext.tasks.comparison.launch import Launch
from lora_ext.tasks.comparison.processes import cuda_devices, end_processes, in_process


class Pool(Protocol):
    """A place where runs are executed. Several threads may call it at the same time.

    Attributes:
        at_once: most runs at the same time.
        runs_here: number of runs that share a machine with others of this pool.
        threads: PyTorch threads of a run.
        needs_threads: whether each call is made in a thread, also if there is one at a time.
    """

    at_once: int
    runs_here: int
    threads: int
    needs_threads: bool

    def call(
        self, function: Callable[..., Any], *args: Any, prepare: Callable[[], None] = lambda: None, **how: Any
    ) -> Any:
        """Calls ``prepare()``, then ``function(*args, on_progress=...)`` elsewhere; returns its value.

        ``how`` and the errors are those of :func:`~lora_ext.tasks.comparison.processes.in_process`.
        """

    def end(self) -> None:
        """Ends what runs, which writes checkpoints; a second call does not wait for these."""


class LocalPool:
    """Processes of this machine: each run has its share of the threads and a CUDA device, if there are any."""

    def __init__(self, at_once: int = 1) -> None:
        self.at_once = self.runs_here = at_once
        self.threads = max(1, torch.get_num_threads() // at_once)
        self.needs_threads = at_once > 1
        self._devices: Queue[str | None] = Queue()
        for device in cuda_devices() or [None] * at_once:
            self._devices.put(device)

    def call(
        self, function: Callable[..., Any], *args: Any, prepare: Callable[[], None] = lambda: None, **how: Any
    ) -> Any:
        prepare()
        device = self._devices.get()
        try:
            return in_process(function, *args, device=device, **how)
        finally:
            self._devices.put(device)

    def end(self) -> None:
        end_processes()


def pool_of(launch: Launch, out: Path, runs: int) -> Pool:
    """Returns the pool for so many runs, whose results go to ``out``."""
    if launch.launcher == "local":
        return LocalPool(launch.at_once(runs))
    from lora_ext.tasks.comparison.submitit_jobs import SubmititPool

    return SubmititPool(launch, out, runs)
