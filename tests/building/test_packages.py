"""The source distribution has every file, and the wheel made of it works where no checkout is."""

from __future__ import annotations

import subprocess
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
PROGRAM = """
import sys, torch, lora_ext
from lora_ext import LoraConfig, inject, load_adapter, save_adapter
assert lora_ext.__file__.startswith(sys.prefix), lora_ext.__file__
config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
base, x = torch.nn.Sequential(torch.nn.Linear(8, 6)), torch.randn(3, 8)
inject(base, config)(x).sum().backward()
expected = base(x)
save_adapter(base, "adapter")
torch.manual_seed(1)
other = torch.nn.Sequential(torch.nn.Linear(8, 6))
other.load_state_dict(lora_ext.adapters.unload(base).state_dict())
torch.testing.assert_close(load_adapter(other, "adapter")(x), expected)
"""


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    return run("git", "ls-files", cwd=ROOT).split("\n")[:-1]


@pytest.fixture(scope="module")
def sdist(tracked, tmp_path_factory) -> Path:
    """Packs a copy of the tracked files, beside which setuptools writes."""
    folder = tmp_path_factory.mktemp("packages")
    for name in tracked:
        copied = folder / "checkout" / name
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", folder, cwd=folder / "checkout")
    (packed,) = folder.glob("*.tar.gz")
    return packed


def test_the_source_distribution_has_every_file(sdist, tracked):
    with tarfile.open(sdist) as tar:
        packed = {name.partition("/")[2] for name in tar.getnames()}
    wanted = {name for name in tracked if not name.startswith((".git", ".ci"))}
    assert sorted(wanted - packed) == []


@pytest.mark.slow  # compiles the extension
def test_its_wheel_works_without_the_checkout(sdist, tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    environment = {"LORA_EXT_CUDA": "0", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", tmp_path, sdist, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    wanted = {"liblora_ext.so", "py.typed", "_C.pyi", "commands/report.html"}
    assert {f"lora_ext/{name}" for name in wanted} <= {*zipfile.ZipFile(wheel).namelist()}
    venv.create(tmp_path / "venv", symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    # Packages of this environment, without its editable installs, which need files of their own.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    run(*pip, f"--python={python}", "install", "--no-deps", "--no-index", wheel)
    run(python, "-c", PROGRAM, cwd=tmp_path)
    assert "CPU kernels" in run(python.parent / "lora-ext", "info", cwd=tmp_path)
