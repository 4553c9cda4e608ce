"""One process at a time works in a directory of results."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import Forked

from lora_ext.tasks import TaskError
from lora_ext.tasks.shared.run_directory import RUNNING, alone_in_out, check_out, prepare_out, shown_files

pytestmark = pytest.mark.cpu_only("is about files")

CALL = """
import sys
from pathlib import Path
sys.path.insert(0, {!r})
from test_run_directory import run
run(Path({!r}), lambda: (print("in", flush=True), input()))
"""


@alone_in_out
def run(out: Path, work: Callable[[], object] = lambda: None, resume: bool = False, overwrite: bool = False) -> None:
    """Stands for a command with ``runs/``."""
    check_out(out, resume, overwrite, marker="settings.json", what="a run", outputs=("runs",))
    prepare_out(out, ("runs",), resume, lambda out: (out / "settings.json").write_text("{}"))
    work()


def refused(out: Path, place: Path | None = None) -> None:
    for how in ({"resume": True}, {"overwrite": True}) if place is None else ({"overwrite": True},):
        with pytest.raises(TaskError, match=f"another process works in {place or out}; wait until it ends, or choose"):
            run(out, **how)


def test_a_run_keeps_others_out_until_it_ends(tmp_path: Path):
    out = tmp_path / "out"
    run(out, lambda: (refused(out), refused(out)))
    assert [path.name for path in out.iterdir()] == ["settings.json"]
    with pytest.raises(ZeroDivisionError):
        run(out, lambda: 1 / 0, resume=True)
    run(out, lambda: refused(out), overwrite=True)


def test_both_began_before_either_had_a_directory(tmp_path: Path):
    """Loading a model takes seconds, between the checks and the first file."""
    out = tmp_path / "out"

    @alone_in_out
    def second() -> None:
        prepare_out(out, (), False, lambda out: (out / "settings.json").write_text("of the second"))

    def meanwhile() -> None:
        with pytest.raises(TaskError, match="another process works in"):
            second()

    run(out, meanwhile)
    assert (out / "settings.json").read_text() == "{}"


def test_overwrite_spares_a_run_below(tmp_path: Path):
    inner = tmp_path / "runs" / "lora" / "seed-0"
    run(tmp_path, lambda: run(inner))
    run(inner, lambda: refused(tmp_path, inner), resume=True)
    run(tmp_path, overwrite=True)
    assert shown_files(tmp_path) == ["settings.json"]


def test_a_killed_process_is_no_obstacle(tmp_path: Path):
    process = Forked(
        "-c", CALL.format(str(Path(__file__).parent), str(tmp_path)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == "in\n"
    refused(tmp_path)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / RUNNING).exists()
    run(tmp_path, lambda: refused(tmp_path), resume=True)
    (tmp_path / RUNNING).touch()
    (tmp_path / "settings.json").unlink()
    run(tmp_path)  # killed before it had written its settings
    assert shown_files(tmp_path) == ["settings.json"] and not (tmp_path / RUNNING).exists()
