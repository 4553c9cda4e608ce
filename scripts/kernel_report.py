#!/usr/bin/env python3
"""Checks the compiled code of every CUDA kernel against the rules of its family.

    python scripts/kernel_report.py build/cuda/lora_ext/liblora_ext_cuda.so

Needs no GPU: cuobjdump and nvdisasm (of the CUDA toolkit, or pip's nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm)
print the registers, the shared memory and the machine code of each kernel for each architecture. FAMILIES states the
rules once per family of kernels; the kernels are those in the binary. Every kernel also has PTX of the oldest
architecture, which cards newer than the binary compile.

Prints a table. Exit status 1: a rule is broken (listed); 2: the binary or the tools cannot be read.
"""

from __future__ import annotations

import argparse
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

# Bytes of shared memory that every architecture gives a block; a pipeline's stages are chosen to fill them.
MAX_BLOCK_SHARED = 99 * 1024


@dataclass(frozen=True)
class Family:
    """The rules for a family of kernels. A kernel belongs to the first family whose pattern matches its name.

    blocks_per_sm is the second number of __launch_bounds__, which the binary does not keep. That number must fit by
    registers and threads everywhere, and by shared memory on multiprocessors with 228 KiB (sm_90, sm_100); smaller ones
    run fewer. dynamic_shared is the maximum number of bytes that the launch adds; the binary does not have it either.
    """

    name: str
    pattern: str  # regular expression, searched in the short demangled name
    blocks_per_sm: int = 2
    dynamic_shared: int = 0
    tensor_cores: bool = False  # multiplies on HMMA
    wide_loads: bool = False  # reads device memory 16 bytes a thread, with or without cp.async
    async_copies: bool = False  # fills its pipeline by cp.async of 16 bytes
    wide_stores: bool = False  # writes device memory 16 bytes a thread


PASS = dict(async_copies=True, wide_loads=True, dynamic_shared=MAX_BLOCK_SHARED)  # over a tall matrix
MMA = dict(tensor_cores=True, **PASS)
FEW_TOKENS = dict(tensor_cores=True, wide_loads=True, dynamic_shared=60 * 1024)
EXPAND = dict(tensor_cores=True, wide_loads=True, wide_stores=True, dynamic_shared=48 * 1024)
GROUPED = dict(wide_loads=True, dynamic_shared=40 * 1024)

FAMILIES = [
    Family("dropout mask", r"^dropout_mask_kernel"),
    # float64 takes twice the registers, too many for two blocks.
    Family("merge's plan, float64", r"^merge_kernel<double, 0>", blocks_per_sm=1, wide_loads=True),
    Family("merge, float64", r"^merge_kernel<double, ", blocks_per_sm=1, wide_loads=True, wide_stores=True),
    Family("merge's plan", r"^merge_kernel<\w+, 0>", wide_loads=True),
    Family("merge", r"^merge_kernel<", wide_loads=True, wide_stores=True),
    Family("gather records", r"^gather_records_kernel", blocks_per_sm=4),
    Family("pack factors", r"^(fma|mma)::pack_factors_kernel"),
    Family("sums", r"^(rank_sums|gradient_sums)_kernel"),
    # One block on a multiprocessor, because both sums are in registers.
    Family("mma shrink and sum", r"^mma::shrink_and_sum_kernel", blocks_per_sm=1, **MMA),
    Family("mma shrink", r"^mma::shrink_kernel", **MMA),
    Family("mma sum over tokens", r"^mma::token_sum_kernel", **MMA),
    # Template arguments: parts of the skinny operands, steps of 16 ranks. One part: the factor is read as it lies.
    Family("mma expand, one part, small", r"^mma::expand_short_kernel<\w+, 1, 1[,>]", blocks_per_sm=3, **EXPAND),
    Family("mma expand, one part", r"^mma::expand_short_kernel<\w+, 1,", **EXPAND),
    Family(
        "mma expand, small", r"^mma::expand_short_kernel<\w+, \d+, 1[,>]", blocks_per_sm=3, async_copies=True, **EXPAND
    ),
    Family("mma expand", r"^mma::expand_short_kernel", async_copies=True, **EXPAND),
    Family("mma expand, long, one part", r"^mma::expand_long_kernel<\w+, 1[,>]", wide_stores=True, **MMA),
    Family("mma expand, long", r"^mma::expand_long_kernel", blocks_per_sm=1, wide_stores=True, **MMA),
    # Loads fragments as they lie in memory, without cp.async; the registers of 9 to 32 tokens leave room for one block.
    Family("mma few tokens, 8", r"^mma::few_tokens_kernel<\w+, 1>", **FEW_TOKENS),
    Family("mma few tokens", r"^mma::few_tokens_kernel", blocks_per_sm=1, **FEW_TOKENS),
    Family("fma shrink", r"^fma::shrink_kernel", **PASS),
    Family("fma sum over tokens", r"^fma::token_sum_kernel", **PASS),
    Family("fma expand, float64", r"^fma::expand_kernel<double", **PASS),  # writes 8 bytes, whole lines a warp
    Family("fma expand", r"^fma::expand_kernel", wide_stores=True, **PASS),
    # Rows that choose their factors.
    Family("grouped index", r"^grouped::(group_index|write_entries)_kernel"),
    Family("grouped few rows, float64", r"^grouped::few_rows_\w+<double", wide_loads=True, dynamic_shared=8 * 1024),
    Family("grouped few rows", r"^grouped::few_rows_", blocks_per_sm=4, wide_loads=True, dynamic_shared=8 * 1024),
    Family("grouped sums of chunks", r"^grouped::grouped_chunk_sums_kernel"),
    Family("grouped mma shrink and sums", r"^grouped::grouped_(shrink|factor_sums)_mma_kernel", **MMA),
    Family("grouped mma expand, float16", r"^grouped::grouped_expand_mma_kernel<__half", 1, wide_stores=True, **MMA),
    Family("grouped mma expand", r"^grouped::grouped_expand_mma_kernel", wide_stores=True, **MMA),
    Family("grouped fma, float64", r"^grouped::grouped_\w+_kernel<double", 1, **GROUPED),
    Family("grouped fma expand", r"^grouped::grouped_expand_kernel", wide_stores=True, **GROUPED),
    Family("grouped fma", r"^grouped::grouped_\w+_kernel", **GROUPED),
]


@dataclass(frozen=True)
class Sm:
    """Resources of a multiprocessor, from the CUDA programming guide's table of technical specifications."""

    threads: int
    shared: int  # bytes for all blocks together; each block also takes the driver's RESERVED_SHARED


REGISTERS_PER_SM, RESERVED_SHARED = 65536, 1024
SMS = {
    "sm_80": Sm(2048, 164 * 1024),
    "sm_86": Sm(1536, 100 * 1024),
    "sm_89": Sm(1536, 100 * 1024),
    "sm_90": Sm(2048, 228 * 1024),
    "sm_100": Sm(2048, 228 * 1024),
    "sm_120": Sm(1536, 100 * 1024),
}
LARGE_SHARED = 228 * 1024

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


# --- reading the tools' output ----------------------------------------------------------------------------------------

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
    name = re.sub(r"(?<=[<, ])(fma|mma)::", "", name)  # in arguments only
    depth = 0
    for position, character in enumerate(name):  # the parameter list: the first bracket outside <>
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:position]
    return name


# --- the rules --------------------------------------------------------------------------------------------------------


def family_of(name: str) -> Family | None:
    return next((family for family in FAMILIES if re.search(family.pattern, name)), None)


def violations(kernel: Kernel) -> list[str]:
    """Describes the rules of its family that the kernel breaks."""
    found = []

    def rule(holds: bool, text: str) -> None:
        if not holds:
            found.append(text)

    has = kernel.instructions
    rule(kernel.stack == 0, f"has a stack frame of {kernel.stack} bytes, want none (spills, or local arrays)")
    rule(kernel.local == 0 and has["local"] == 0, f"uses local memory ({has['local']} LDL or STL), want none")
    rule(has["all"] > 0, "has no machine code for this architecture")
    rule(kernel.max_threads > 0, "has no __launch_bounds__")
    family = family_of(kernel.name)
    if family is None:
        return [*found, "belongs to no family: add one to FAMILIES"]
    if family.tensor_cores:
        rule(has["HMMA"] > 0, "has no HMMA, but multiplies on tensor cores")
    if family.wide_loads:
        rule(has["LDG.128"] + has["LDGSTS.128"] > 0, "reads nothing 16 bytes wide (LDG or LDGSTS .128)")
    if family.async_copies:
        rule(has["LDGSTS.128"] > 0, "has no cp.async of 16 bytes (LDGSTS.128)")
    if family.wide_stores:
        rule(has["STG.128"] > 0, "writes nothing 16 bytes wide (STG.128)")
    block_shared = kernel.own_shared + family.dynamic_shared
    rule(block_shared <= MAX_BLOCK_SHARED, f"wants {block_shared} bytes of shared memory, at most {MAX_BLOCK_SHARED}")
    if kernel.max_threads:
        has_room = kernel.sm.shared >= LARGE_SHARED
        blocks = kernel.blocks_per_sm(family.dynamic_shared) if has_room else kernel.blocks_by_registers()
        rule(
            blocks >= family.blocks_per_sm,
            f"fits {blocks} times on a multiprocessor, want {family.blocks_per_sm} ({kernel.registers} registers x "
            f"{kernel.max_threads} threads, {block_shared} bytes of shared memory)",
        )
    return found


def missing_ptx(kernels: list[Kernel], ptx: dict[str, set[str]]) -> list[str]:
    """Describes the kernels without PTX of the oldest architecture, apart from those that fit one card only (90a)."""
    archs = {kernel.arch.removeprefix("sm_") for kernel in kernels}
    plain = [arch for arch in archs if arch.isdigit()]
    if not plain:
        return []
    oldest = min(plain, key=int)
    found = set().union(*(symbols for arch, symbols in ptx.items() if arch.isdigit() and int(arch) <= int(oldest)))
    without = {kernel.name: None for kernel in kernels if kernel.symbol not in found}
    return [f"{name} has no PTX of sm_{oldest} or older, so that newer cards cannot run it" for name in without]


def report(kernels: list[Kernel]) -> tuple[str, list[str]]:
    """Returns the table (one row for architectures that agree) and the violations."""
    heads = ["kernel", "sm", "threads", "registers", "shared", "blocks/SM", "code", *INSTRUCTIONS]
    rows: dict[tuple[str, ...], list[str]] = {}
    broken = []
    for kernel in kernels:
        family = family_of(kernel.name)
        dynamic = family.dynamic_shared if family else 0
        fits = kernel.blocks_per_sm(dynamic) if kernel.max_threads else 0
        shared = f"{kernel.own_shared}+{dynamic}" if dynamic else str(kernel.own_shared)
        counts = [str(kernel.instructions[column] or "-") for column in INSTRUCTIONS]
        cells = (kernel.max_threads, kernel.registers, shared, fits, kernel.instructions["all"])
        rows.setdefault((kernel.name, *map(str, cells), *counts), []).append(kernel.arch.removeprefix("sm_"))
        broken += [f"{kernel.name} for {kernel.arch}: {text}" for text in violations(kernel)]
    table = [heads] + [[row[0], ",".join(dict.fromkeys(archs)), *row[1:]] for row, archs in rows.items()]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    lines = []
    for row in table:
        names = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        figures = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*names, *figures]).rstrip())
    return "\n".join(lines), list(dict.fromkeys(broken))


# --- the tools --------------------------------------------------------------------------------------------------------


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--arch", help="only this one, for example sm_90a")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="architectures read at a time")
    args = parser.parse_args()
    tools = find_tools()
    if tools is None:
        print("kernel_report: no cuobjdump and nvdisasm; pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
        return 2
    if not args.library.exists():
        print(f"kernel_report: {args.library} does not exist; `make cuda` builds it")
        return 2
    cuobjdump = cuobjdump_of(args.library, tools)
    kernels = read_kernels(cuobjdump, args.jobs, args.arch)
    if not kernels:
        print(f"kernel_report: {args.library} has no kernels for {args.arch or 'any architecture'}")
        return 2
    table, broken = report(kernels)
    ptx = parse_ptx(cuobjdump("--dump-ptx"))
    broken += missing_ptx(kernels, ptx)
    print(table)
    num_names, num_archs = len({kernel.name for kernel in kernels}), len({kernel.arch for kernel in kernels})
    newer = f"PTX of {', '.join(f'sm_{arch}' for arch in ptx)}" if ptx else "no PTX"
    print(f"\n{num_names} kernels for {num_archs} architectures, {newer}, {len(broken)} rules broken")
    for text in broken:
        print(f"  {text}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
