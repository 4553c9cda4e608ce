"""Installs wheels into clean environments, and imports, computes, injects and asks for info there.

    python scripts/try_wheels.py [WHEEL...]        # without names: those in dist/ for this processor that have labels

The environments, in build/environments, have the oldest supported torch on the oldest Python, and the newest torch on
the newest Python, of those that this machine has. They are downloads of gigabytes, and stay. In them are the wheel, its
requirements and nothing else, and no compiler is on PATH.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = 10
CASES = {"oldest": (min, "torch==2.11.*"), "newest": (max, "torch")}  # name -> (which Python, torch)
PROGRAM = """
import json, os, subprocess, sys, torch, lora_ext
from pathlib import Path
from lora_ext import LoraConfig, functional, inject, load_adapter, merge, save_adapter, unmerge
assert lora_ext.__file__.startswith(sys.prefix), lora_ext.__file__

x, weight, lora_A, lora_B = torch.randn(3, 8), torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
torch.testing.assert_close(
    functional.lora_linear(x, weight, None, lora_A, lora_B, scaling=2.0), x @ (weight + 2 * lora_B @ lora_A).T
)

config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
base = torch.nn.Sequential(torch.nn.Linear(8, 6))
inject(base, config)(x).sum().backward()
expected, before = base(x), base[0].base_layer.weight.clone()
save_adapter(base, "adapter")
other = torch.nn.Sequential(torch.nn.Linear(8, 6))
other.load_state_dict(lora_ext.adapters.unload(base).state_dict())
torch.testing.assert_close(load_adapter(other, "adapter")(x), expected)
torch.testing.assert_close(merge(other.eval())(x), expected)
unmerge(other)
assert torch.equal(other[0].base_layer.weight, before)

command = Path(sys.prefix) / "bin" / "lora-ext"
info = json.loads(subprocess.run([command, "info", "--json"], check=True, capture_output=True, text=True).stdout)
assert info["version"] == lora_ext.__version__, info
has_cuda_kernels = "+cu" in lora_ext.__version__
assert info["cuda"]["kernels_built"] == has_cuda_kernels, info
assert info["cuda"]["kernels_loaded"] == (has_cuda_kernels and torch.version.cuda is not None), info
print(f"torch {torch.__version__}, Python {sys.version.split()[0]}, kernels for {info['cpu']['isa']}")
"""


@functools.cache
def find_pythons() -> dict[int, str]:
    """Returns the interpreters 3.x of this machine, x -> path: on PATH, pyenv's, and the one that runs this."""
    folders = [*os.environ["PATH"].split(os.pathsep), *map(str, Path.home().glob(".pyenv/versions/*/bin"))]
    found = {sys.version_info[1]: sys.executable}
    for minor in range(OLDEST_PYTHON, 30):
        for folder in folders:
            path = shutil.which(f"python3.{minor}", path=folder)
            test = "import ensurepip, sys; print(sys.version_info[1], sys.executable)"  # not the path of a wrapper
            said = subprocess.run([path, "-c", test], capture_output=True, text=True).stdout.split() if path else []
            if said and said[0] == str(minor):
                found.setdefault(minor, said[1])
                break
    return found


def run(*command: object, **options: object) -> str:
    """Returns the output. RuntimeError: the command failed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        output = done.stdout[-2000:] + done.stderr[-3000:]
        raise RuntimeError(f"{' '.join(map(str, command[:6]))} failed with status {done.returncode}:\n{output}")
    return done.stdout


def make_environment(case: str) -> Path:
    """Returns the folder of one of CASES, which is made once. RuntimeError: its packages cannot be had."""
    choose, torch = CASES[case]
    minor, python = choose(find_pythons().items())
    folder = ROOT / "build" / "environments" / f"{case}-3.{minor}"
    if not (folder / ".ready").exists():
        run(python, "-m", "venv", "--clear", folder)
        run(folder / "bin/pip", "install", "--quiet", torch, "numpy")
        (folder / ".ready").touch()
    return folder


def of_environment(wheels: Iterable[Path], environment: Path) -> list[Path]:
    """Returns the wheels for an environment's Python. RuntimeError: there is none."""
    tag = "-cp{0}-cp{0}-".format(environment.name.rpartition("-")[2].replace(".", ""))
    found = [wheel for wheel in wheels if tag in wheel.name]
    if not found:
        raise RuntimeError(f"no wheel has the tag {tag.strip('-')}")
    return found


def try_wheel(wheel: Path, environment: Path, work: Path) -> str:
    """Installs the wheel, and runs PROGRAM in an empty folder. Returns what it prints. RuntimeError: it fails."""
    pip = [environment / "bin/pip", "--disable-pip-version-check"]
    run(*pip, "install", "--quiet", "--force-reinstall", "--no-deps", wheel)
    run(*pip, "install", "--quiet", wheel)  # what it requires
    alone = {"PATH": str(environment / "bin"), "HOME": str(work)}
    return run(environment / "bin/python", "-I", "-c", PROGRAM, cwd=work, env=alone).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL")
    wheels = parser.parse_args().wheels or sorted((ROOT / "dist").glob(f"*+*_{platform.machine()}.whl"))
    for case in CASES:
        environment = make_environment(case)
        for wheel in of_environment(wheels, environment):
            work = environment / "work"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            print(f"{wheel.name}: {try_wheel(wheel.resolve(), environment, work)}", flush=True)


if __name__ == "__main__":
    main()
