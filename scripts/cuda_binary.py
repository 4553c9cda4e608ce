"""Reads the kernels of a CUDA library: names, resources and counts of instructions, by cuobjdump and nvdisasm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Sm:
    """Resources of a multiprocessor, from the CUDA programming guide's table of technical specifications."""

    threads: int
    shared: int  # bytes for all blocks together; each block also takes the driver's RESERVED_SHARED


REGISTERS_PER_SM = 65536
RESERVED_SHARED = 1024
SMS = {
    "sm_80": Sm(2048, 164 * 1024),
    "sm_86": Sm(1536, 100 * 1024),
    "sm_89": Sm(1536, 100 * 1024),
    "sm_90": Sm(2048, 228 * 1024),
    "sm_100": Sm(2048, 228 * 1024),
    "sm_120": Sm(1536, 100 * 1024),
}


# Columns of the table: how often an instruction occurs. LDGSTS is cp.async; HMMA the tensor cores on 16 bits.
INSTRUCTIONS = {
    "HMMA": r"HMMA\.",
    "LDGSTS.128": r"LDGSTS\..*\b128\b",
    "LDG.128": r"LDG\..*\b128\b",
    "STG.128": r"STG\..*\b128\b",
    "LDSM": r"LDSM\.",
    "local": r"(LDL|STL)\b",  # spilled registers, and arrays indexed at run time
}


@dataclass
class Kernel:
    arch: str
    symbol: str
    registers: int = 0
    stack: int = 0
    shared: int = 0
    local: int = 0
    max_threads: int = 0  # of __launch_bounds__; 0: none
    instructions: Counter[str] = field(default_factory=Counter)
    name: str = ""  # demangled, without namespaces and parameters

    @property
    def sm(self) -> Sm:
        return SMS[self.arch.rstrip("af")]

    @property
    def own_shared(self) -> int:
        """Static shared memory; from sm_90 on, the compiler's figure includes the driver's."""
        counts_reserved = int(re.sub(r"\D", "", self.arch)) >= 90
        return max(self.shared - RESERVED_SHARED, 0) if counts_reserved else self.shared

    def blocks_by_registers(self) -> int:
        """Number of blocks of max_threads that fit by registers and threads."""
        warps = -(-self.max_threads // 32)
        warp_registers = max(-(-self.registers * 32 // 256) * 256, 256)  # allocated in units of 256
        by_registers = REGISTERS_PER_SM // warp_registers // 4 * 4  # warps, equally on four schedulers
        return min(by_registers // warps, self.sm.threads // (32 * warps))

    def blocks_per_sm(self, dynamic_shared: int) -> int:
        """Number of blocks that fit by registers, threads and shared memory."""
        return min(self.blocks_by_registers(), self.sm.shared // (self.own_shared + dynamic_shared + RESERVED_SHARED))


_ARCH = re.compile(r"^arch = (\S+)$")
_RESOURCES_OF = re.compile(r"^ Function (\S+):$")
_RESOURCES = re.compile(r"^  REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+) ")
_CODE_OF = re.compile(r"^\s+Function : (\S+)$")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)")
_NV_INFO_OF = re.compile(r"^\.nv\.info\.(\S+)$")
_PTX_TARGET = re.compile(r"^\.target\s+sm_(\w+)")
_PTX_ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry (\w+)\(")
_INTERESTING = {column: re.compile(pattern) for column, pattern in INSTRUCTIONS.items()}


def parse_code(lines: Iterable[str]) -> list[Kernel]:
    """Parses ``cuobjdump --dump-resource-usage --dump-sass``; returns a kernel per object and architecture."""
    kernels: list[Kernel] = []
    arch, of_object, current = "", {}, None
    counted: dict[str, list[str]] = {}  # opcode -> the columns it counts in
    for line in lines:
        if match := _INSTRUCTION.match(line):
            opcode = match[1]
            if opcode not in counted:
                counted[opcode] = [column for column, pattern in _INTERESTING.items() if pattern.match(opcode)]
            if current:
                current.instructions["all"] += 1
                current.instructions.update(counted[opcode])
        elif match := _ARCH.match(line):
            arch, of_object, current = match[1], {}, None
        elif match := _RESOURCES_OF.match(line):
            current = of_object.setdefault(match[1], Kernel(arch, match[1]))
            if current not in kernels[-len(of_object) :]:
                kernels.append(current)
        elif match := _RESOURCES.match(line):
            if current:
                current.registers, current.stack, current.shared, current.local = map(int, match.groups())
        elif match := _CODE_OF.match(line):
            current = of_object.get(match[1])
    return kernels


def parse_max_threads(lines: Iterable[str]) -> dict[str, int]:
    """Parses threads per block by symbol from the EIATTR_MAX_THREADS attributes of ``cuobjdump --dump-elf``."""
    threads: dict[str, int] = {}
    symbol, wanted = "", False
    for line in lines:
        if match := _NV_INFO_OF.match(line):
            symbol = match[1]
        elif line.lstrip().startswith("Attribute:"):
            wanted = "EIATTR_MAX_THREADS" in line
        elif wanted and symbol and line.lstrip().startswith("Value:"):
            x, y, z = (int(value, 16) for value in line.split()[1:4])
            threads[symbol], wanted = x * y * z, False
    return threads


def parse_ptx(lines: Iterable[str]) -> dict[str, set[str]]:
    """Parses ``cuobjdump --dump-ptx``; returns the kernels' symbols by architecture, such as ``{"80": {"_Z1f"}}``."""
    symbols: dict[str, set[str]] = {}
    arch = ""
    for line in lines:
        if match := _PTX_TARGET.match(line):
            arch = match[1]
            symbols.setdefault(arch, set())
        elif match := _PTX_ENTRY.match(line):
            symbols[arch].add(match[1])
    return symbols


def short_name(demangled: str) -> str:
    """Shortens ``void lora_ext::cuda::f<(int)16, true>(Params)`` to ``f<16, true>``."""
    name = re.sub(r"\(anonymous namespace\)::|\blora_ext::(cuda::)?|^void ", "", demangled)
    name = re.sub(r"\([\w: ]+\)(?=-?\d)", "", name)  # (int)16, (KeepBits)1
    name = re.sub(r"(?<=[<, ])mma::", "", name)  # in arguments only
    depth = 0
    for position, character in enumerate(name):  # the parameter list: the first bracket outside <>
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:position]
    return name


def find_tools() -> Path | None:
    """Finds the folder with cuobjdump and nvdisasm: pip's, PATH's or the toolkit's."""
    folders = [bin_ for path in sys.path for bin_ in sorted(Path(path or ".").glob("nvidia/cu[0-9]*/bin"))]
    folders += [Path(found).parent] if (found := shutil.which("cuobjdump")) else []
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders += [Path(home) / "bin" for home in homes if home]
    return next((f for f in folders if (f / "cuobjdump").exists() and (f / "nvdisasm").exists()), None)


def cuobjdump_of(library: Path, tools: Path) -> Callable[..., list[str]]:
    """Returns a function that runs cuobjdump with its options on the library, and returns the lines it prints."""
    # cuobjdump starts nvdisasm by its name.
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}

    def cuobjdump(*options: str) -> list[str]:
        command = [tools / "cuobjdump", *options, library]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.splitlines()

    return cuobjdump


def read_kernels(cuobjdump: Callable[..., list[str]], jobs: int, only_arch: str | None = None) -> list[Kernel]:
    """Reads every kernel of a library for every architecture; equal kernels of several objects count once."""

    def of_arch(arch: str) -> list[Kernel]:
        threads = parse_max_threads(cuobjdump("--dump-elf", "--gpu-architecture", arch))
        kernels = parse_code(cuobjdump("--dump-resource-usage", "--dump-sass", "--gpu-architecture", arch))
        for kernel in kernels:
            kernel.max_threads = threads.get(kernel.symbol, 0)
        return kernels

    listed = cuobjdump("--list-elf")
    archs = dict.fromkeys(match[1] for line in listed if (match := re.search(r"\.(sm_\w+)\.cubin", line)))
    if only_arch:
        archs = {arch: None for arch in archs if arch == only_arch}
    with ThreadPoolExecutor(jobs) as pool:
        found = [kernel for kernels in pool.map(of_arch, archs) for kernel in kernels]
    symbols = list(dict.fromkeys(kernel.symbol for kernel in found))
    demangled = symbols
    if shutil.which("c++filt"):  # comes with the linker
        filtered = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
        demangled = filtered.stdout.splitlines()
    names = dict(zip(symbols, map(short_name, demangled), strict=True))
    unique: list[Kernel] = []
    for kernel in found:
        kernel.name = names[kernel.symbol]
        if kernel not in unique:
            unique.append(kernel)
    order = list(archs)
    return sorted(unique, key=lambda kernel: (kernel.name, order.index(kernel.arch)))
