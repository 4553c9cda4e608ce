"""Tests the binary's promises: the stable ABI, correct build facts, and loud failures."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.processes import after_torch

import lora_ext
from lora_ext import _load, info
from lora_ext.commands import main
from lora_ext.export import library_paths

pytestmark = [pytest.mark.cpu_only("is about the binary"), pytest.mark.full]

PACKAGE = Path(lora_ext.__file__).parent
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("library", ["liblora_ext.so", "liblora_ext_cuda.so"])
def test_no_unstable_torch_symbol_is_used(library):
    """Checks that the binary uses nothing of torch's C++ ABI, so that it runs with other torch releases."""
    path = PACKAGE / library
    if not path.exists():
        assert library == "liblora_ext_cuda.so" and _load.build_info()["no_cuda_reason"]
        pytest.skip(f"no CUDA part: {_load.build_info()['no_cuda_reason']}")
    symbols = subprocess.run(["nm", "-DuC", path], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_" in symbols
    assert not [line for line in symbols.splitlines() if re.search(r"\b(c10|at|torch)::", line)]
    # The ops need no Python.
    assert not re.search(r"\b_?Py[A-Z_]\w+", symbols)
    assert "libpython" not in subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout


def test_the_module_of_facts_and_plans_needs_no_torch():
    needed = subprocess.run(["ldd", _load._C.__file__], capture_output=True, text=True, check=True).stdout
    assert "libtorch" not in needed and "libc10" not in needed


def test_the_message_about_an_old_torch_names_the_binarys_minimum():
    assert _load.build_info()["torch_minimum"] == _load.TORCH_MINIMUM


def test_no_build_paths_in_the_binary():
    # Error messages contain file names; these must not tell where the package was built.
    for binary in (PACKAGE / "liblora_ext.so", Path(_load._C.__file__)):
        assert str(ROOT).encode() not in binary.read_bytes()


def test_info_tells_the_facts():
    facts = info.gather()
    assert facts["version"] == lora_ext.__version__ == _load.build_info()["version"]
    assert facts["torch"] == torch.__version__
    assert facts["libraries"] == [str(path) for path in library_paths()]
    assert library_paths()[0] == PACKAGE / "liblora_ext.so"
    assert facts["cpu"]["isa"] in facts["cpu"]["isas_available"] and "generic" in facts["cpu"]["isas_available"]
    cuda = facts["cuda"]
    assert cuda["kernels_loaded"] == (cuda["reason"] is None)
    assert cuda["kernels_built"] == bool(cuda["architectures"]) == (PACKAGE / "liblora_ext_cuda.so").exists()
    # Newer cards compile the PTX of the oldest architecture; that of an architecture with a letter fits no other.
    plain = [int(arch) for arch in cuda["architectures"] if arch.isdigit()]
    assert cuda["ptx"] == (str(min(plain)) if plain else None)
    if torch.version.cuda is None and cuda["kernels_built"]:
        assert "build without CUDA" in cuda["reason"]


def test_info_command_prints_text_and_json(capsys):
    said = subprocess.run([sys.executable, "-m", "lora_ext", "info"], capture_output=True, text=True)
    assert (said.returncode, said.stderr) == (0, "")
    assert re.search(r"^CPU kernels +(amx|avx512_bf16|avx512|avx2|generic) \(this machine runs ", said.stdout, re.M)
    assert re.search(r"^CUDA in use +(yes|no: )", said.stdout, re.M)
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["version"] == lora_ext.__version__


# --- packages that do not fit -----------------------------------------------------------------------------------------

OTHER = "was built from other sources than this Python package: it has no "
OPS, FACTS = "liblora_ext.so", Path(_load._C.__file__).name
OTHER_PYTHON = "_C.cpython-39-x86_64-linux-gnu.so"
# A file of the package, its other content or None, and words of the error.
MISFITS = {
    "missing": (OPS, lambda content: None, "the compiled library liblora_ext.so is missing"),
    "damaged": (OPS, lambda content: b"no", r"liblora_ext.so does not load with torch.*(invalid ELF|too short)"),
    "another op": (
        OPS,
        lambda content: content.replace(b"lora_dropout_mask(", b"lora_dropout_was_("),
        OTHER + "op lora_d",
    ),
    "no module": (FACTS, lambda content: None, r"the compiled module _C of Python 3\.\d+ is missing from"),
    "damaged module": (FACTS, lambda content: b"not a library", r"_C does not load: .*(invalid ELF|too short)"),
    "another function": (FACTS, lambda content: content.replace(b"\0cpu_isa\0", b"\0cpu_was\0"), OTHER + "cpu_isa"),
}
# Imports the package in a directory, without the finder of an editable install.
IMPORT = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder)]
sys.path = ["{root}/checkout", *(path for path in sys.path if path and path != {here!r}), "{root}/site"]
import lora_ext
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, str]:
    """Returns, by name, what the import of each package prints."""
    root = tmp_path_factory.mktemp("packages")
    for name in (*MISFITS, "another Python"):
        package = root / name / "checkout" / "lora_ext"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if name == "another Python":
            (package / FACTS).rename(package / OTHER_PYTHON)
            continue
        file, change, _ = MISFITS[name]
        content = change((package / file).read_bytes())
        (package / file).unlink() if content is None else (package / file).write_bytes(content)
    for name in ("hides nothing", "hides one"):
        for place in ("checkout", "site"):
            (root / name / place / "lora_ext").mkdir(parents=True)
        for file in ("__init__.py", "_load.py"):
            shutil.copy(PACKAGE / file, root / name / "checkout" / "lora_ext")
        (root / name / "checkout" / "csrc").mkdir()
        (root / name / "checkout" / "setup.py").touch()
    (root / "hides one" / "site" / "lora_ext" / "liblora_ext.so").touch()
    found = after_torch({path.name: IMPORT.format(root=path, here=str(ROOT)) for path in root.iterdir()})
    assert {status for status, _ in found.values()} == {1}, found
    return {name: said for name, (_, said) in found.items()}


@pytest.mark.parametrize("name", MISFITS)
def test_a_library_that_does_not_fit_fails_the_import(name, errors):
    assert re.search(f"ImportError: lora_ext: .*{MISFITS[name][2]}", errors[name], re.S), errors[name]


def test_a_module_of_another_python_is_named(errors):
    assert f"(it has {OTHER_PYTHON}, of another Python)" in errors["another Python"]


@pytest.mark.parametrize("name", ["hides nothing", "hides one"])
def test_a_checkout_without_a_build_says_what_it_hides(name, errors):
    message, installed = errors[name], name == "hides one"
    assert "This is a checkout without a build" in message and re.search("`make build` in .*/checkout", message)
    assert ("start Python in another folder" in message) == installed
    assert bool(re.search("installed in .*/site/lora_ext", message)) == installed
    assert "--force-reinstall" not in message
