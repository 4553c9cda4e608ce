"""The source distribution has every file; wheels work where there is no checkout and no compiler."""

from __future__ import annotations

import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.cpu_only("is about packages"),
    pytest.mark.full,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no checkout, whose tracked files would be packed"),
]
sys.path.insert(0, str(ROOT / "scripts"))
import build_wheels  # noqa: E402
import try_wheels  # noqa: E402


@pytest.fixture(scope="module")
def sdist() -> Path:
    (sdist,) = build_wheels.build("sdist")
    return sdist


def test_the_source_distribution_has_the_tracked_files(sdist):
    with tarfile.open(sdist) as tar:
        packed = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    tracked = {*try_wheels.run("git", "ls-files", cwd=ROOT).split("\n")[:-1]}
    wanted = {name for name in tracked if not name.startswith((".git", ".ci"))}
    assert sorted(wanted - packed) == []
    assert sorted(name for name in packed - tracked if ".egg-info/" not in name) == ["PKG-INFO", "setup.cfg"]


@pytest.mark.slow  # compiles the extension
def test_its_wheel_works_without_the_checkout(sdist, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environment = {"LORA_EXT_CUDA": "0", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    try_wheels.run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, sdist, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    wanted = {"liblora_ext.so", "py.typed", "_C.pyi", "commands/report.html"}
    assert {f"lora_ext/{name}" for name in wanted} <= {*zipfile.ZipFile(wheel).namelist()}
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Packages of this environment, without its editable installs, which need files of their own.
    site = Path(try_wheels.run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    try_wheels.run(*pip, f"--python={python}", "install", "--no-deps", "--no-index", wheel)
    try_wheels.run(python, "-c", try_wheels.PROGRAM, cwd=tmp_path)


@pytest.fixture(scope="module")
def wheels() -> list[Path]:
    """Builds the wheels of `make wheel` from the working tree."""
    missing = {name: reason for name in ("cpu", "cuda") if (reason := build_wheels.why_not(name))}
    if missing:
        pytest.skip(f"wheels that cannot be built here: {missing}")
    return [wheel for name in ("cpu", "cuda") for wheel in build_wheels.build(name)]


@pytest.mark.slow  # compiles both wheels, and installs gigabytes
@pytest.mark.parametrize("case", try_wheels.CASES)
def test_wheels_work_in_clean_environments(case, wheels, tmp_path):
    try:
        environment = try_wheels.make_environment(case)
    except RuntimeError as error:
        pytest.skip(f"no environment with the {case} torch: {error}")
    tried = try_wheels.of_environment(wheels, environment)
    assert len(tried) == 2, "one for CPUs and one with CUDA"
    for wheel in tried:
        work = tmp_path / wheel.name
        work.mkdir()
        try_wheels.try_wheel(wheel, environment, work)
