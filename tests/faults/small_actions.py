"""Changes files by Python, Rust (safetensors) and C++ (torch.save) with every fault. Argument: a directory."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from faults.tries import Fault, attempt, each_call

top = Path(sys.argv[1])
tensors = {"a": torch.arange(4.0)}


def by_python(directory: Path) -> None:
    (directory / "file").write_text("content")
    os.replace(directory / "file", directory / "moved")
    (directory / "inner").mkdir()
    shutil.copyfile(directory / "moved", directory / "inner" / "copy")
    (directory / "moved").unlink()


def by_rust(directory: Path) -> None:
    save_file(tensors, directory / "file")


def by_cpp(directory: Path) -> None:
    torch.save(tensors, directory / "file")


results: dict[str, dict] = {}
for action in (by_python, by_rust, by_cpp):
    directory = top / action.__name__
    elsewhere = top / "elsewhere"

    def prepare(directory: Path = directory) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()

    def run(directory: Path = directory, action=action) -> None:
        action(directory)

    elsewhere.mkdir(exist_ok=True)
    prepare()
    seen = results[action.__name__] = {"elsewhere": attempt(run, Fault(elsewhere, "kill", 1)).ended}
    for kind in ("kill", "disk full", "read-only"):
        tries = [outcome for _, outcome in each_call(run, directory, kind, prepare)]
        seen[kind] = {"calls": len(tries) - 1, "ended": sorted({t.ended for t in tries}), "last": tries[-1].ended}
        seen[kind]["errors"] = sorted({t.error for t in tries} - {""})
        seen[kind]["called"] = sorted({t.last for t in tries} - {""})
    prepare()
    directory.chmod(0o500)
    seen["no rights"] = attempt(run, Fault(elsewhere), as_owner_only=True).error
    directory.chmod(0o700)
print(json.dumps(results))
