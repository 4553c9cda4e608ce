"""Bugs to plant in mutants/product.cu, and the report that the stand-in must make for each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from .build import CACHE, SIMT
from .driver import Library, library_of
from .edits import replace_once

SOURCE = SIMT / "mutants" / "product.cu"
FOLDER = CACHE / "mutants"


@dataclass(frozen=True)
class Mutation:
    """An edit of the source, and the report that it must cause when threads run in order."""

    name: str
    old: str  # occurs exactly once
    new: str
    kind: str
    at: str  # occurs in the source line that the report names
    block: int = 0
    thread: int = 0

    @property
    def path(self):
        return FOLDER / self.name / SOURCE.name


EARLIER = "  ptx::wait_for_earlier_launches();\n"
WAIT = "    ptx::cp_async_wait<kStages - 2>();\n"
BARRIER = "    __syncthreads();  // all copies of this tile are complete, the slot to fill next is free\n"
FETCH = "    fetch(tile + kStages - 1);\n"
COPY = "    ptx::cp_async_16(ptx::shared_address(tile + i * kCopy), from, inside ? 16 : 0);\n"
STORE = "*reinterpret_cast<float4*>(p.out + row * kBlockN + col) = four;"
SHUFFLE = "positives += __shfl_xor_sync(0xFFFFFFFFu, positives, distance);"
COUNT = "  if (lane == 0) warp_positives[warp] = positives;\n"
ROW = "const int row = row0 + warp * 16 + lane / 2,"

# name, old text, new text, kind of report, text of the reported line; block and thread
MUTATIONS = [
    Mutation("original", "namespace MUTANT {\n", "namespace MUTANT {\n", "", ""),
    # --- earlier launches
    Mutation("no_wait_for_earlier_launches", EARLIER, "", "earlier-launch-not-waited", "cp_async_16("),
    Mutation(
        "some_threads_wait_for_earlier_launches",
        EARLIER,
        "  if (threadIdx.x < 40) ptx::wait_for_earlier_launches();\n",
        "earlier-launch-not-waited",
        "cp_async_16(",
        0,
        40,
    ),
    # --- barriers
    Mutation("missing_barrier", BARRIER, "", "race-shared", "ldmatrix_x4(b", 0, 1),
    Mutation("barrier_before_wait", WAIT + BARRIER, BARRIER + WAIT, "async-copy-not-waited", "ldmatrix_x4(b", 0, 32),
    Mutation(
        "barrier_of_one_warp",
        COUNT + "  __syncthreads();\n",
        COUNT + "  if (warp == 0) __syncthreads();\n",
        "divergent-barrier",
        "__syncthreads",
    ),
    Mutation(
        "barrier_in_two_branches",
        BARRIER,
        "    if (lane < 16) {\n      __syncthreads();\n    } else {\n      __syncthreads();\n    }\n",
        "divergent-barrier",
        "__syncthreads",
        0,
        16,
    ),
    Mutation(
        "return_before_barrier",
        "  float sum[4] = {};\n",
        "  float sum[4] = {};\n  if (row0 + thread >= p.rows) return;\n",
        "divergent-barrier",
        "__syncthreads",
        1,
        0,
    ),
    Mutation("missing_syncwarp", "  __syncwarp();\n", "", "uninitialised-read", "float4 four", 0, 32),
    Mutation("sum_before_barrier", COUNT + "  __syncthreads();\n", COUNT, "race-shared", "+= warp_positives", 0, 0),
    # --- asynchronous copies
    Mutation("missing_wait", WAIT, "", "async-copy-not-waited", "ldmatrix_x4(b", 0, 32),
    Mutation("wait_off_by_one", "<kStages - 2>", "<kStages - 1>", "async-copy-not-waited", "ldmatrix_x4(b", 0, 32),
    Mutation("slot_reused_before_barrier", BARRIER + FETCH, FETCH + BARRIER, "race-shared", "cp_async_16", 0, 32),
    Mutation(
        "slot_reused_while_read", FETCH, "    fetch(tile + kStages);\n", "async-copy-not-waited", "ldmatrix_x4(a", 0, 40
    ),
    Mutation(
        "copy_left_in_flight",
        "tile < tiles; ++tile",
        "tile < tiles - 1; ++tile",
        "async-copy-leak",
        "cp_async_16",
        0,
        32,
    ),
    Mutation(
        "missing_zero_fill", COPY, "    if (!inside) continue;\n" + COPY, "uninitialised-read", "ldmatrix_x4(a", 2, 32
    ),
    Mutation("misaligned_copy", "* stride + col :", "* stride + col + 1 :", "misaligned", "cp_async_16"),
    # --- addresses
    Mutation(
        "row_test_forgotten", "row < rows && col < cols", "col < cols", "out-of-bounds-global", "cp_async_16", 2, 0
    ),
    Mutation(
        "column_test_forgotten", "row < rows && col < cols", "row < rows", "uninitialised-read", "cp_async_16", 0, 33
    ),
    Mutation(
        "store_past_the_end", "  if (row < p.rows) {", "  if (row <= p.rows) {", "out-of-bounds-global", STORE, 2, 12
    ),
    Mutation(
        "array_too_small",
        'kStages * kBlockM * kBlockK, "x_tiles"',
        '(kStages - 1) * kBlockM * kBlockK, "x_tiles"',
        "out-of-bounds-shared",
        "cp_async_16",
        0,
        32,
    ),
    Mutation("too_little_for_launch", "kSharedBytes, on", "512, on", "out-of-bounds-shared", "x_tiles"),
    Mutation("too_much_for_launch", "kSharedBytes, on", "100 << 10, on", "launch-limits", ""),
    Mutation("misaligned_vector", "[lane * 4]);", "[lane * 4 - lane % 2]);", "misaligned", "float4 four", 0, 33),
    Mutation("index_outside_registers", "= sum[i];", "= sum[i + 1];", "undefined-behaviour", "sum[i + 1]", 0, 32),
    Mutation("null_pointer", STORE, STORE.replace("p.out", "(float*)nullptr"), "wild-access", "nullptr", 0, 32),
    Mutation("host_reads_device_memory", "positives, rows, cols", "positives, int(*x), cols", "host-access", "int(*x)"),
    # --- several threads at one place
    Mutation(
        "missing_atomic", "atomicAdd(p.positives, total);", "*p.positives += total;", "race-global", "+= total", 1
    ),
    Mutation("blocks_write_the_same", ROW, ROW.replace("row0 + ", ""), "race-global", STORE, 1, 32),
    Mutation("warps_write_the_same", ROW, ROW.replace("warp * 16 + ", ""), "race-global", STORE, 0, 0),
    # --- warps
    Mutation("shuffle_under_divergence", SHUFFLE, "if (row < p.rows) " + SHUFFLE, "divergent-warp", "__shfl", 2, 0),
    Mutation("shuffle_of_half_a_warp", "0xFFFFFFFFu, pos", "0xFFFFu, pos", "divergent-warp", "__shfl", 0, 32),
]


@functools.cache
def library() -> Library:
    """Builds all mutants as one library: compiling them together takes a tenth of the time."""
    together = []
    for mutation in MUTATIONS:
        mutation.path.parent.mkdir(parents=True, exist_ok=True)
        text = replace_once(SOURCE.read_text(), mutation.old, mutation.new, f"{mutation.name}: {SOURCE.name}")
        mutation.path.write_text(text)
        together.append(f'#define MUTANT {mutation.name}\n#include "{mutation.path}"\n#undef MUTANT\n')
    (FOLDER / "mutants.cu").write_text("".join(together))
    return library_of("mutants", FOLDER / "mutants.cu")
