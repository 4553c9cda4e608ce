"""Measures seconds and resident memory of a call in a separate process; the memory of importing torch is separate."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

DRIVER = """
import json, sys, time
import torch

def resident():
    return 1024 * int(dict(line.split(":", 1) for line in open("/proc/self/status"))["VmHWM"].split()[0])

torch_bytes = resident()
begin = time.perf_counter()
{call}
seconds = time.perf_counter() - begin
print(json.dumps({{"seconds": seconds, "resident_bytes": resident(), "torch_bytes": torch_bytes}}))
"""


def measure(name: str, call: str, arguments: Sequence[object], threads: int) -> dict[str, float]:
    """Runs the Python lines ``call`` with ``arguments`` in ``sys.argv[1:]``; ``name`` is for the error.

    Returns:
        ``seconds`` of the call, imports included; ``resident_bytes``, the process's peak (VmHWM); ``torch_bytes``, the
        peak right after importing torch.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    command = [sys.executable, "-c", DRIVER.format(call=call), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_all(
    names: Iterable[str], rounds: int, measure_one: Callable[[str], dict[str, float]]
) -> list[dict[str, object]]:
    """Measures all in turn, several rounds; returns a row for each. measure_one: calls :func:`measure`."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, done in results.items():
            done.append(measure_one(name))
            print(f"{name}: {done[-1]['seconds']:.1f} s, {done[-1]['resident_bytes'] / 1e6:.0f} MB", flush=True)
    return [_summary(name, done) for name, done in results.items()]


def _summary(name: str, rounds: Sequence[dict[str, float]]) -> dict[str, object]:
    """Returns a row with the median time and the maximum memory of several results of :func:`measure`."""
    return {
        "name": name,
        "rounds": len(rounds),
        "seconds": statistics.median(result["seconds"] for result in rounds),
        "resident_bytes": max(result["resident_bytes"] for result in rounds),
        "beyond_torch_bytes": max(result["resident_bytes"] - result["torch_bytes"] for result in rounds),
    }


def memory_cells(row: dict) -> list[str]:
    """Formats the memory of a row, in MB."""
    return [f"{row[key] / 1e6:.0f}" for key in ("resident_bytes", "beyond_torch_bytes")]
