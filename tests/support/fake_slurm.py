"""Slurm's commands as shell scripts that run jobs on this machine, so that submitit's own Slurm code can be tested."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

_NUMBERS = itertools.count(100, 100)  # submitit remembers the states of jobs for as long as the process lives

_SBATCH = """
[ -e "$SLURM/refuse" ] && { echo "sbatch: error: invalid partition specified" >&2; exit 1; }
id=$(($(cat "$SLURM/last") + 1)); echo $id > "$SLURM/last"; cp "$1" "$SLURM/$id.sh"
[ -e "$SLURM/full" ] || {
    export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
    setsid sh "$SLURM/$id.sh" > /dev/null 2>&1 < /dev/null &  # submitit moves "$1", as Slurm copies it
    echo $! > "$SLURM/$id.pid"
}
echo "Submitted batch job $id"
"""

_SRUN = """
out=$(echo "$3" | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/"); err=$(echo "$5" | sed "s/%j/$SLURM_JOB_ID/; s/%t/0/")
shift 5; "$@" >> "$out" 2>> "$err"
"""

_SACCT = """
echo "JobID|State|NodeList"
for id in "$@"; do
    [ -e "$SLURM/$id.sh" ] || continue
    if [ -e "$SLURM/$id.cancelled" ]; then state="CANCELLED by 0"
    elif [ ! -e "$SLURM/$id.pid" ]; then state=PENDING
    else case "$(sed 's/.*) //; s/ .*//' "/proc/$(cat "$SLURM/$id.pid")/stat" 2> /dev/null)" in
        "" | Z) state=FAILED;;
        *) state=RUNNING;;
    esac; fi
    echo "$id|$state|here"
done
"""

_SCANCEL = """
touch "$SLURM/$1.cancelled"; [ -e "$SLURM/$1.pid" ] && kill -KILL "-$(cat "$SLURM/$1.pid")" 2> /dev/null; exit 0
"""


class FakeSlurm:
    """Slurm of one machine.

    Attributes:
        directory: ``<id>.sh`` for every job that was submitted, with ``<id>.pid`` and ``<id>.cancelled``.
    """

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = directory
        commands = directory / "bin"
        commands.mkdir(parents=True)
        (directory / "last").write_text(str(next(_NUMBERS)))
        for name, text in {"sbatch": _SBATCH, "srun": _SRUN, "sacct": _SACCT, "scancel": _SCANCEL}.items():
            (commands / name).write_text(f"#!/bin/sh\nSLURM={directory}{text}")
            (commands / name).chmod(0o755)
        patch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")

    def jobs(self) -> list[str]:
        return sorted(path.stem for path in self.directory.glob("*.sh"))

    def script(self, job: str) -> str:
        return (self.directory / f"{job}.sh").read_text()

    def refuse(self) -> None:
        """Lets sbatch fail from now on."""
        (self.directory / "refuse").touch()

    def fill(self) -> None:
        """Lets jobs wait in the queue from now on."""
        (self.directory / "full").touch()

    def is_cancelled(self, job: str) -> bool:
        return (self.directory / f"{job}.cancelled").exists()

    def end(self) -> None:
        """Ends all jobs."""
        for job in self.jobs():
            os.system(f"scancel {job}")
