"""Tests scripts/gpu_toolkit.py: toolkits, packages and libraries of scripts/gpu_check.py."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_check  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_toolkit  # noqa: E402

pytestmark = [pytest.mark.cpu_only("tests a script"), pytest.mark.full]


@pytest.mark.parametrize(
    "capability, arch",
    [((8, 0), "80"), ((8, 6), "86"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")],
)
def test_architecture_of_the_card(capability, arch):
    assert gpu_parts.arch_of(capability) == arch


def toolkit(folder: Path, version: str) -> Path:
    (folder / "bin").mkdir(parents=True)
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.48'\n")
    nvcc.chmod(0o755)
    return folder


def test_the_toolkit_is_that_of_torch(tmp_path):
    old, other, same = (toolkit(tmp_path / v, v) for v in ("12.9", "13.2", "13.0"))
    missing = tmp_path / "missing"
    find = gpu_toolkit.find_cuda_home
    assert find("13.0", [missing, old, other, same]) == same
    assert find("13.1", [missing, old, other, same]) == other  # the first of the same major version
    assert find("13.0", [missing, old]) is None
    assert find("1.0", [old]) is None
    too_old = toolkit(tmp_path / "12.6", "12.6")  # setup.py refuses it
    assert find("12.6", [too_old, old]) == old and find("12.6", [too_old]) is None


def test_a_toolkit_from_pip_links_from_its_lib_folder(tmp_path):
    home = toolkit(tmp_path / "nvidia" / "cu13", "13.0")
    (home / "lib").mkdir()
    command = gpu_toolkit.golden_command(home, "90a", tmp_path / "golden.so")
    assert f"-L{home}/lib" in command and f"-L{home}/lib64" not in command
    (home / "lib64").mkdir()
    command = gpu_toolkit.golden_command(home, "90a", tmp_path / "golden.so")
    assert command.index(f"-L{home}/lib64") < command.index(f"-L{home}/lib")


@pytest.mark.slow
def test_golden_links_with_a_toolkit_that_has_only_lib(tmp_path):
    """nvcc looks for the runtime in lib64 by itself; a toolkit from pip has lib only."""
    homes = [home for home in gpu_toolkit.cuda_home_candidates() if (home / "bin" / "nvcc").exists()]
    if not homes:
        pytest.skip("no nvcc")
    pip = tmp_path / "cu13"
    pip.mkdir()
    for entry in homes[0].iterdir():
        if entry.name not in ("lib64", "targets", "bin"):
            (pip / entry.name).symlink_to(entry)
    (pip / "bin").mkdir()  # nvcc finds its toolkit from where it lies
    for program in (homes[0] / "bin").iterdir():
        if program.is_file():
            shutil.copy(program, pip / "bin")
        else:
            (pip / "bin" / program.name).symlink_to(program)
    target = tmp_path / "golden.so"
    result = subprocess.run(gpu_toolkit.golden_command(pip, "80", target), capture_output=True, text=True)
    assert result.returncode == 0 and target.exists(), result.stderr[-2000:]


def test_missing_packages_are_said_before_anything_else(monkeypatch, capsys):
    versions = {"setuptools": "68.1.2", "torch": "2.11.0+cu130", "pytest": "8"}
    monkeypatch.setattr(gpu_toolkit.importlib.metadata, "version", lambda name: versions.get(name, "9999"))
    monkeypatch.setattr(gpu_toolkit.importlib.util, "find_spec", lambda name: None if name == "regex" else object())
    monkeypatch.setattr(gpu_toolkit, "find_program", lambda name: None if name == "ninja" else "/bin/x")
    with pytest.raises(SystemExit) as caught:
        gpu_check.say_what_is_missing(builds=True)
    said = capsys.readouterr().err
    assert caught.value.code == 2
    command = f"{sys.executable} -m pip install 'regex>=2025.10.22' 'setuptools>=77' 'ninja>=1.11'"
    assert said == f"gpu_check: regex is missing, setuptools 68.1.2 is too old, ninja is missing: {command}\n"
    with pytest.raises(SystemExit):
        gpu_check.say_what_is_missing(builds=False)  # only building needs the others
    assert "regex is missing" in (said := capsys.readouterr().err) and "ninja" not in said and "setuptools" not in said
    versions["setuptools"] = "80"
    monkeypatch.setattr(gpu_toolkit.importlib.util, "find_spec", lambda name: object())
    gpu_check.say_what_is_missing(builds=False)
    monkeypatch.setattr(gpu_toolkit, "find_program", lambda name: None)
    with pytest.raises(SystemExit):
        gpu_check.say_what_is_missing(builds=True)
    assert "no C++ compiler (c++): install g++ 11 or newer" in capsys.readouterr().err


def test_what_is_looked_for_is_what_the_package_requires():
    assert f"MIN_NVCC = {gpu_toolkit.MIN_NVCC}" in (ROOT / "setup.py").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    for requirement in (gpu_toolkit.TO_RUN | gpu_toolkit.TO_BUILD | gpu_toolkit.TO_TEST).values():
        assert f'"{requirement}"' in project, requirement


@pytest.mark.parametrize(
    "archs, ptx, capability, runs",
    [
        ("80,90a", "80", (9, 0), True),
        ("90a", "", (9, 0), True),
        ("90a", "", (10, 0), False),  # fits one card only
        ("80", "", (8, 9), True),
        ("86", "", (8, 0), False),
        ("80", "", (9, 0), False),
        ("80", "80", (9, 0), True),  # the driver compiles the PTX
        ("120", "120", (10, 0), False),
        ("", "", (8, 0), False),
    ],
)
def test_cards_that_a_library_runs_on(archs, ptx, capability, runs):
    assert gpu_toolkit.runs_on(archs, ptx, capability) == runs


def test_a_library_comes_from_a_wheel_or_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_toolkit, "PACKAGE", tmp_path / "package")
    (tmp_path / "package").mkdir()
    names = gpu_toolkit.LIBRARIES

    def installed() -> list[str]:
        return [(tmp_path / "package" / name).read_text() for name in names]

    with zipfile.ZipFile(wheel := tmp_path / "lora_ext.whl", "w") as archive:
        for name in names:
            archive.writestr(f"lora_ext/{name}", f"wheel {name}")
    gpu_toolkit.install_library(wheel)
    assert installed() == [f"wheel {name}" for name in names]
    folder = tmp_path / "folder"
    for where in (folder / "lora_ext", folder):
        where.mkdir(exist_ok=True, parents=True)
        for name in names:
            (where / name).write_text(f"{where.name} {name}")
        gpu_toolkit.install_library(folder)
        assert installed() == [f"lora_ext {name}" for name in names]
    shutil.rmtree(folder / "lora_ext")
    gpu_toolkit.install_library(folder / names[1])
    assert installed() == [f"folder {name}" for name in names]
    (folder / names[0]).unlink()
    with pytest.raises(
        SystemExit, match=r"no liblora_ext.so; want a wheel of this Python, or a folder with all of them"
    ):
        gpu_toolkit.install_library(folder)
    assert installed() == [f"folder {name}" for name in names]
