"""A process that is killed while it writes leaves whole files or none, and the next run is not disturbed."""

from __future__ import annotations

import json

import pytest
from support.processes import run_forked

pytestmark = [pytest.mark.cpu_only("is about files, which hold CPU tensors"), pytest.mark.full]


def test_a_file_is_whole_or_absent(tmp_path):
    done = run_forked("-m", "faults.killed", tmp_path, OMP_NUM_THREADS="1")  # threads cannot fork
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found["new adapter"]) == {"", "new"}
    assert {"old", "new"} <= set(found["adapter"]) <= {"old", "", "new"}
    assert set(found["merge"]) == {"", "new"}
    for states in found.values():
        assert len(states) > 5 and states[-1] == "new"
        assert states == sorted(states, key=["old", "", "new"].index)
