"""The three sanitizers: flags for g++, options of the run, and the pattern of a report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_UNDEFINED = (
    "undefined",  # signed overflow, null, alignment, shift, bounds, vla, bool, enum, unreachable ...
    "bounds-strict",
    "float-cast-overflow",
    # Not float-divide-by-zero: IEEE 754 defines it, and the kernels rely on it.
)


@dataclass(frozen=True)
class Sanitizer:
    """One of gcc's sanitizers.

    Attributes:
        name: the make target.
        flags: for the compiler and the linker.
        runtime: its library, to be loaded before all others, because python is not compiled with it.
        options_variable, options: the run-time library's environment variable and options.
        report: matches the first line of a report.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    runtime: str
    options_variable: str
    options: Mapping[str, str]
    report: re.Pattern[str]
    preload: bool = True
    fixed_addresses: bool = False

    def runtime_path(self) -> Path:
        """Finds the compiler's run-time library. RuntimeError: it has none."""
        path = _compilers_library(self.runtime)
        if path is None:
            raise RuntimeError(
                f"make {self.name}: {compiler()} has no {self.runtime}, the run-time library of {self.flags[0]}. "
                "It comes with gcc on Debian and Ubuntu (apt-get install g++); on Fedora, dnf install "
                f"{self.runtime.removesuffix('.so')}"
            )
        return path

    def environment(self, reports: Path, preloaded: Sequence[Path] = (), **options: str) -> dict[str, str]:
        """Returns the environment variables of a run; paths of its reports start with ``reports``."""
        settings = {"log_path": str(reports), "exitcode": "66", **self.options, **options}
        variables = {self.options_variable: ":".join(f"{key}={value}" for key, value in settings.items())}
        if self.preload:
            # The run-time library looks for the C++ library's functions at its start, before python loads that.
            libraries = [self.runtime_path(), _compilers_library("libstdc++.so.6"), *preloaded]
            variables["LD_PRELOAD"] = " ".join(map(str, filter(None, libraries)))
        return variables

    def prefix(self) -> list[str]:
        """Returns a command prefix that disables address randomisation if the sanitizer's layout requires it."""
        command = [shutil.which("setarch") or "setarch", "-R"]
        allowed = self.fixed_addresses and shutil.which("setarch") and _succeeds([*command, "true"])
        return command if allowed else []


def compiler() -> str:
    """Finds g++: the reports, run-time libraries and flags below are gcc's."""
    name = os.environ.get("CXX", "g++")
    if path := shutil.which(name):
        return path
    raise RuntimeError(f"the sanitizers need g++ (11 or newer) on PATH, or its name in CXX: there is no {name}")


def _compilers_library(name: str) -> Path | None:
    says = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True)
    path = Path(says.stdout.strip())
    return path.resolve() if says.returncode == 0 and path.is_absolute() else None  # else it repeats the name


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0


SANITIZERS = {
    "asan": Sanitizer(
        "asan",
        "AddressSanitizer",
        # Calls instead of inlined checks compile in a third of the time, and tests are small.
        ("-fsanitize=address", "--param=asan-instrumentation-with-call-threshold=0"),
        "libasan.so",
        "ASAN_OPTIONS",
        {
            "detect_leaks": "0",  # python and torch keep thousands of blocks until the end
            "detect_stack_use_after_return": "1",
            "strict_init_order": "1",
            "allocator_may_return_null": "1",  # like malloc, so that the op reports impossible sizes
            "max_malloc_fill_size": str(1 << 30),  # memory that a kernel does not write holds the fuzzer's poison
            "malloc_fill_byte": str(0xFE),
        },
        re.compile(r"(AddressSanitizer|LeakSanitizer): .*"),
    ),
    "ubsan": Sanitizer(
        "ubsan",
        "UndefinedBehaviorSanitizer",
        (f"-fsanitize={','.join(_UNDEFINED)}", "-fno-sanitize-recover=all"),
        "libubsan.so",
        "UBSAN_OPTIONS",
        {"print_stacktrace": "1"},
        re.compile(r"\S+: runtime error: .*"),
        preload=False,  # the libraries link it
    ),
    "tsan": Sanitizer(
        "tsan",
        "ThreadSanitizer",
        ("-fsanitize=thread",),
        "libtsan.so",
        "TSAN_OPTIONS",
        {
            # Python's and torch's synchronisation is not seen, so their memory accesses must be ignored, too.
            "ignore_noninstrumented_modules": "1",
            "history_size": "4",
            "allocator_may_return_null": "1",
            "report_signal_unsafe": "0",  # python's handlers
        },
        re.compile(r"WARNING: ThreadSanitizer: .*"),
        fixed_addresses=True,  # gcc 12's supports at most 28 random bits; newer kernels use more
    ),
}
