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
import sys
from dataclasses import dataclass
from pathlib import Path

from cuda_binary import INSTRUCTIONS, Kernel, cuobjdump_of, find_tools, parse_ptx, read_kernels

# Bytes of shared memory that every architecture gives a block; a pipeline's stages are chosen to fill them.
MAX_BLOCK_SHARED = 99 * 1024


@dataclass(frozen=True)
class Family:
    """The rules for a family of kernels. A kernel belongs to the first family whose pattern matches its name.

    blocks_per_sm is the second number of __launch_bounds__, which the binary does not keep. That number must fit by
    registers and threads everywhere, and by shared memory on SMs with 228 KiB (sm_90, sm_100); smaller ones
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
FEW_TOKENS = dict(tensor_cores=True, wide_loads=True, dynamic_shared=84 * 1024)
EXPAND = dict(tensor_cores=True, wide_loads=True, wide_stores=True, dynamic_shared=48 * 1024)

FAMILIES = [
    Family("dropout mask", r"^dropout_mask_kernel"),
    # float64 takes twice the registers, too many for two blocks.
    Family("merge's plan, float64", r"^merge_kernel<double, 0,", blocks_per_sm=1, wide_loads=True),
    Family("merge, float64", r"^merge_kernel<double, ", blocks_per_sm=1, wide_loads=True, wide_stores=True),
    Family("merge's plan", r"^merge_kernel<\w+, 0,", wide_loads=True),
    Family("merge", r"^merge_kernel<", wide_loads=True, wide_stores=True),
    Family("sums", r"^(rank_sums|gradient_sums)_kernel"),
    # One block on an SM, because both sums are in registers.
    Family("mma shrink and sum", r"^mma::shrink_and_sum_kernel", blocks_per_sm=1, **MMA),
    # Template arguments: the dtype of x, ranks of a block. The sums of 128 ranks leave registers for one block.
    Family("mma shrink, 128 ranks", r"^mma::shrink_kernel<\w+, 128,", blocks_per_sm=1, **MMA),
    Family("mma sum over tokens, 128 ranks", r"^mma::token_sum_kernel<\w+, 128,", blocks_per_sm=1, **MMA),
    Family("mma shrink", r"^mma::shrink_kernel", **MMA),
    Family("mma sum over tokens", r"^mma::token_sum_kernel", **MMA),
    # Template arguments: the dtype of x, steps of 16 ranks.
    Family("mma expand, small", r"^mma::expand_short_kernel<\w+, 1[,>]", blocks_per_sm=3, **EXPAND),
    Family("mma expand", r"^mma::expand_short_kernel", **EXPAND),
    Family("mma expand, long", r"^mma::expand_long_kernel", wide_stores=True, **MMA),
    # Loads fragments as they lie in memory, without cp.async; the registers of 9 to 32 tokens leave room for one block.
    Family("mma few tokens, 8", r"^mma::few_tokens_kernel<\w+, 1,", **FEW_TOKENS),
    Family("mma few tokens", r"^mma::few_tokens_kernel", blocks_per_sm=1, **FEW_TOKENS),
    # Rows that choose their factors.
    Family("grouped index", r"^grouped::group_index_kernel", blocks_per_sm=1),  # the only block of its launch
    Family("grouped entries", r"^grouped::write_entries_kernel"),
    Family("grouped few rows", r"^grouped::few_rows_", blocks_per_sm=4, wide_loads=True, dynamic_shared=4 * 1024),
    Family("grouped sums of chunks", r"^grouped::grouped_chunk_sums_kernel"),
    Family("grouped shrink and sums", r"^grouped::grouped_(shrink|factor_sums)_kernel", **MMA),
    Family("grouped expand", r"^grouped::grouped_expand_kernel", wide_stores=True, **MMA),
]


LARGE_SHARED = 228 * 1024


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
            f"fits {blocks} times on an SM, want {family.blocks_per_sm} ({kernel.registers} registers x "
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
