"""Bugs to plant in the kernels themselves, and what tests/simt must say about each.

All of them are in one library, each behind a question that is answered when the kernel runs (mutants/planted.cpp): the
kernels are compiled once more, and not once for every bug. An edit adds and removes no line, so that reports name the
lines of csrc/cuda. With the plans for few blocks, pipelines go round at small sizes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from .build import SIMT
from .driver import FEW_MULTIPROCESSORS, Library
from .edits import Edit, edited_kernels
from .mutation_runs import (
    BF16,
    KernelMutation,
    Report,
    backward,
    few_tokens,
    forward,
    grouped,
    merge,
    merge_record,
    unmerge,
)

SOURCES = "lora_bfloat16", "merge", "grouped"  # of csrc/cuda; they contain the bugs

RACE, NOT_WAITED, UNINITIALISED = ("race-shared",), ("async-copy-not-waited",), ("uninitialised-read",)
OUT_OF_BOUNDS = ("out-of-bounds-global",)

MUTATIONS = [
    # --- merge
    KernelMutation(
        "merge_refills_tiles_in_use",
        merge(20, 300, 20),
        "merge.cuh",
        "if {+(+}(tile > 0 || r0 > 0) {+&& !BUG) +}__syncthreads();",
        Report(RACE, "merge_kernel", "_tile"),
    ),
    KernelMutation(
        "merge_forgets_the_last_columns",
        merge(20, 300, 20),
        "merge.cuh",
        "thread < cols {+|| BUG +}? lora_A[",
        Report(OUT_OF_BOUNDS, "merge_kernel", "lora_A[(r0 + r)"),
    ),
    KernelMutation(
        "merge_leaves_missing_rows_undefined",
        merge(5, 300, 3),
        "merge.cuh",
        "{+if (inside || !BUG) +}lora_B_tile[r * kPitchB + row] = inside",
        Report(UNINITIALISED, "merge_kernel", "row_B[i] = lora_B_tile["),
    ),
    KernelMutation(
        "merge_loads_a_tile_too_many",
        merge(70, 300, 3),
        "merge.cuh",
        "if (row < out_features{+ || BUG+}) elements.load(",
        Report(OUT_OF_BOUNDS, "merge_kernel", "", "merge_elements.cuh"),
    ),
    KernelMutation(
        "records_of_segments_overlap",
        merge_record(5, 600, 3),
        "merge.cuh",
        "uint16_t* const record = layer.corrections + range.begin{+ / (BUG ? 16 : 1)+};",
        Report(("race-global",), "merge_kernel", "record"),
    ),
    KernelMutation(
        "a_record_is_written_a_word_too_far",
        merge_record(5, 600, 3),
        "merge.cuh",
        "if (at < words) record[at{+ + (BUG ? 1 : 0)+}] =",
        Report(OUT_OF_BOUNDS + ("race-global",), "merge_kernel", "record[at"),
    ),
    KernelMutation(
        "unmerge_corrects_before_others_have_written",
        unmerge,
        "merge.cuh",
        "{+if (!BUG) +}__syncwarp();  // the candidates",
        Report(("race-global",), "merge_kernel", "weight[col]"),
    ),
    # --- earlier launches
    KernelMutation(
        "shrink_does_not_wait_for_earlier_launches",
        forward(BF16, 40, 840, 40, 8),
        "mma/shrink.cuh",
        "  {+if (!BUG) +}ptx::wait_for_earlier_launches();",
        Report(("earlier-launch-not-waited",), "shrink_kernel", "ptx::cp_async_16(", "mma/tiles.cuh"),
    ),
    KernelMutation(
        "gradient_sums_end_without_waiting",
        backward(BF16, 40, 72, 40, 8, "A"),
        "sums.cuh",
        "gradient_sums_kernel(const __grid_constant__ GradientSumsParams p) {\n"
        "  {+if (!BUG || threadIdx.x < 128) +}ptx::wait_for_earlier_launches();",
        Report(("earlier-launch-not-waited",), "gradient_sums_kernel", "gradient_sums_kernel(const"),
    ),
    # --- the scratch memory
    KernelMutation(
        "partial_sums_begin_in_the_middle_of_the_scratch_memory",
        forward(BF16, 40, 840, 40, 8),
        "mma/run_plan.cuh",
        "reinterpret_cast<V*>(scratch_ + offset{+ + (BUG ? plan_.scratch.bytes / 2 : 0)+});",
        Report(OUT_OF_BOUNDS, "shrink_kernel", "data[range * range_stride", "sums.cuh"),
    ),
    # --- token passes
    KernelMutation(
        "shrink_does_not_wait",
        forward(BF16, 40, 840, 40, 8),
        "mma/shrink.cuh",
        "    {+if (!BUG) +}ptx::cp_async_wait<kStages - 2>();\n",
        Report(NOT_WAITED, "shrink_kernel", "ldmatrix_x4"),
    ),
    KernelMutation(
        "tile_copy_forgets_the_last_rows",
        forward(BF16, 40, 840, 40, 8),
        "mma/tiles.cuh",
        "static_cast<int>(row) < rows {+|| BUG +}? width",
        Report(OUT_OF_BOUNDS, "shrink_kernel", "ptx::cp_async_16("),
    ),
    KernelMutation(
        "shrink_reads_lora_A_beyond_its_last_rank",
        forward(BF16, 40, 840, 40, 8),
        "mma/shrink.cuh",
        "rank < p.factor.rank{+ || BUG+} ? p.factor.row(rank)",
        Report(OUT_OF_BOUNDS, "shrink_kernel", "ptx::cp_async_16(ptx::shared_address(to), from, width * 2)"),
    ),
    KernelMutation(
        "shrink_and_sum_reads_lora_B_beyond_its_last_feature",
        backward(BF16, 40, 72, 136, 16, "xB"),
        "mma/shrink_and_sum.cuh",
        "r < rank && {+(+}feature < features{+ || BUG)+} ? from[0]",
        Report(OUT_OF_BOUNDS, "shrink_and_sum_kernel", "from[0]"),
    ),
    KernelMutation(
        "token_sum_lacks_its_barrier",
        backward(BF16, 400, 72, 40, 20, "A"),
        "mma/token_sum.cuh",
        "    ptx::cp_async_wait<kStages - 2>();\n    {+if (!BUG || step == 0) +}__syncthreads();",
        Report(RACE + NOT_WAITED, "token_sum_kernel", "ldmatrix_x4"),
    ),
    KernelMutation(
        "shrink_and_sum_adds_shares_too_early",
        backward(BF16, 40, 72, 136, 16, "xB"),
        "mma/shrink_and_sum.cuh",
        "  {+if (!BUG) +}__syncthreads();\n  add_shares(steps - 1);",
        Report(RACE + UNINITIALISED, "shrink_and_sum_kernel", "warp_share["),
    ),
    # --- expand
    KernelMutation(
        "expand_short_lacks_its_barrier",
        forward(BF16, 21, 72, 136, 8),
        "mma/expand_short.cuh",
        "  {+if (!BUG) +}__syncthreads();\n  if (row0",
        Report(RACE + UNINITIALISED, "expand_short_kernel", "ldmatrix_x4_transposed(b"),
    ),
    KernelMutation(
        "expand_adds_a_partial_sum_too_many",
        forward(BF16, 21, 840, 136, 8),
        "mma/expand_short.cuh",
        "      for (int range ={+ BUG ? -1 :+} 0; range < max(first, second); ++range) {",
        Report(OUT_OF_BOUNDS + UNINITIALISED, "expand_short_kernel", "pair = *reinterpret_cast<const float2*>(at)"),
    ),
    KernelMutation(
        "sums_are_written_by_every_tile_of_columns",
        forward(BF16, 21, 840, 600, 8),
        "mma/expand_short.cuh",
        "{+(+}blockIdx.y == tiles.begin {+|| BUG) +}&& warp < row_warps;",
        Report(("race-global",), "expand_short_kernel", "pairs[step][i]."),
    ),
    KernelMutation(
        "lora_B_is_read_beyond_its_last_row",
        forward(BF16, 21, 72, 140, 8),
        "mma/expand_short.cuh",
        "col0 + col < sibling.cols {+|| BUG +}?",
        Report(OUT_OF_BOUNDS, "expand_short_kernel", "return *reinterpret_cast<const uint4*>(from);"),
    ),
    KernelMutation(
        "lora_A_is_read_beyond_its_last_column",
        backward(BF16, 21, 72, 40, 8, "x"),
        "mma/expand_short.cuh",
        "from ?{+ (BUG ? kChunk :+} inside<kChunk>(col0 + chunk * kChunk, factor.features){+)+} : 0;",
        Report(OUT_OF_BOUNDS, "expand_short_kernel", "return *reinterpret_cast<const uint4*>(from);"),
    ),
    KernelMutation(
        "expand_long_fills_the_buffer_in_use",
        forward(BF16, 21, 72, 136, 100),
        "mma/expand_long.cuh",
        "load_factor({+BUG ? buffer : +}1 - buffer, step + 1);",
        Report(RACE + NOT_WAITED, "expand_long_kernel", "ldmatrix_x4_transposed(b"),
    ),
    KernelMutation(
        "expand_forgets_the_last_rows",
        forward(BF16, 21, 72, 136, 8),
        "mma/expand_output.cuh",
        "8 * i < rows_ {+|| BUG +}?",
        Report(OUT_OF_BOUNDS, "expand_short_kernel", "reinterpret_cast<uint4*>(to)"),
    ),
    # --- few tokens
    KernelMutation(
        "few_tokens_adds_shares_too_early",
        few_tokens(5, 600, 40, 8),
        "mma/few_tokens.cuh",
        "  {+if (!BUG) +}__syncthreads();\n",
        Report(RACE + UNINITIALISED, "few_tokens_kernel", "_tile["),
    ),
    KernelMutation(
        "few_tokens_reads_a_row_too_many",
        few_tokens(5, 600, 40, 8),
        "mma/few_tokens.cuh",
        "has_columns && {+(+}lane / 4 + i * 8 < rows{+ || BUG)+});",
        Report(OUT_OF_BOUNDS, "few_tokens_kernel", "reinterpret_cast<const uint4*>(from)"),
    ),
    KernelMutation(
        "few_tokens_reads_beyond_the_last_column",
        few_tokens(5, 600, 40, 8),
        "mma/few_tokens.cuh",
        "column + lane % 4 * 8 < p.in_features{+ || BUG+};",
        Report(OUT_OF_BOUNDS, "few_tokens_kernel", "reinterpret_cast<const uint4*>(from)"),
    ),
    KernelMutation(
        "few_tokens_writes_xa_in_every_block",
        few_tokens(5, 600, 40, 8),
        "mma/few_tokens.cuh",
        "p.adds_partials && {+(+}blockIdx.x == sibling.first_block{+ || BUG)+};",
        Report(("race-global",), "few_tokens_kernel", "p.sums[at] = value"),
    ),
    # --- sums of several blocks
    KernelMutation(
        "sums_of_groups_are_read_too_early",
        backward(BF16, 200, 72, 40, 8, "A"),
        "sums.cuh",
        "  group_sums[group][element] = sum;\n  {+if (!BUG) +}__syncthreads();\n",
        Report(RACE + UNINITIALISED, "gradient_sums_kernel", "sum += group_sums[other][element]"),
    ),
    # --- rows that choose their factors
    KernelMutation(
        "index_adds_counts_too_early",
        grouped(BF16, [30, 50], (24, 20), 4),
        "grouped/group_index.cuh",
        "  {+if (!BUG) +}__syncthreads();\n",
        Report(RACE + UNINITIALISED, "group_index_kernel", "_of_warp[w]"),
    ),
    KernelMutation(
        "tiles_without_rows_have_no_group",
        grouped(BF16, [30, 50], (24, 20), 4),
        "grouped/group_index.cuh",
        "first_of(begin + count, rows.rows_per_entry, group + {+(BUG ? 0 : +}1{+)+});",
        Report(UNINITIALISED, "grouped_shrink_kernel", "group = index.group_of_tile[tile];", "grouped/group_index.cuh"),
    ),
    KernelMutation(
        "few_rows_read_xa_too_early",
        grouped(BF16, [3, 2], (24, 20), 4),
        "grouped/few_rows.cuh",
        "  {+if (!BUG) +}__syncthreads();\n",
        Report(RACE + UNINITIALISED, "few_rows_expand_kernel", "sum += xa[rank + e]"),
    ),
    KernelMutation(
        "few_rows_read_beyond_the_last_feature",
        grouped(BF16, [1], (76, 20), 4),
        "grouped/few_rows.cuh",
        "{+BUG ? kEight : +}eight_inside(column, end);",
        Report(OUT_OF_BOUNDS, "few_rows_shrink_kernel", "values.v[i] = i < inside", "grouped/eights.cuh"),
    ),
    KernelMutation(
        "grouped_expand_forgets_the_last_rows",
        grouped(BF16, [30, 50], (24, 20), 4),
        "grouped/expand.cuh",
        "i < {+(BUG ? Tiles::kRows : +}tile.count{+)+} * kRowEights; i += kThreads",
        Report(UNINITIALISED, "grouped_expand_kernel", "finish_eight<kBackward>("),
    ),
    KernelMutation(
        "chunks_of_two_groups_share_partial_sums",
        grouped(BF16, [600, 600], (24, 20), 4, is_backward=True),
        "grouped/factor_sums.cuh",
        "chunk.group_begin / ({+BUG ? kChunkRows : +}kChunkRows / 2) + chunk.number;",
        Report(("race-global",), "grouped_factor_sums_kernel", "p.partial[(place"),
    ),
    KernelMutation(
        "grouped_shrink_waits_for_one_copy_less",
        grouped(BF16, [30, 50], (840, 20), 4),
        "grouped/shrink.cuh",
        "    {+BUG ? ptx::cp_async_wait<kStages - 1>() : +}ptx::cp_async_wait<kStages - 2>();\n",
        Report(NOT_WAITED, "grouped_shrink_kernel", "ptx::ldmatrix_x4(x, "),
    ),
    KernelMutation(
        "grouped_expand_fills_the_tile_in_use",
        grouped(BF16, [30, 50], (24, 136), 40),
        "grouped/expand.cuh",
        "copy(rank0 + kRanks, stage ^ {+(BUG ? 0 : +}1){+)+};",
        Report(RACE + NOT_WAITED, "grouped_expand_kernel", "ptx::ldmatrix_x4(b, "),
    ),
    KernelMutation(
        "grouped_factor_sums_reads_rows_too_early",
        grouped(BF16, [30, 50], (24, 20), 4, is_backward=True),
        "grouped/factor_sums.cuh",
        "  load_rows(rows, p.index, chunk);\n  {+if (!BUG) +}__syncthreads();\n",
        Report(RACE + UNINITIALISED, "grouped_factor_sums_kernel", "rows[at] * p."),
    ),
    KernelMutation(
        "grouped_factor_sums_waits_for_one_copy_less",
        grouped(BF16, [120], (24, 20), 4, is_backward=True),
        "grouped/factor_sums.cuh",
        "    {+BUG ? ptx::cp_async_wait<kStages - 1>() : +}ptx::cp_async_wait<kStages - 2>();\n",
        Report(NOT_WAITED, "grouped_factor_sums_kernel", "ptx::ldmatrix_x4_transposed(x, "),
    ),
    KernelMutation(
        "entries_are_written_beyond_the_last",
        grouped(BF16, [1] * 33, (24, 20), 4),
        "grouped/group_table.cuh",
        "if (i < p.count{+ || BUG+})",
        Report(OUT_OF_BOUNDS, "write_entries_kernel", "p.to[i] = p.entries[i]"),
    ),
]


# Code that no mutation runs, by file. It is left out of the second compilation, which then takes a third less time.
# These edits, too, leave every line at its number.
NOT_RUN = {
    "elements.cuh": [
        "f(std::type_identity<double>{})",
        "f(std::type_identity<__nv_bfloat16>{})",
        "f(std::type_identity<__half>{})",
    ],
    "grouped.cu": ["return grouped::run_launches<__half>(call, plan, scratch, stream);"],
    "mma/run_plan.cuh": [
        "keep == KeepBits::kDraw ? &shrink_kernel<T, kSmallRanks, KeepBits::kDraw>\n" + " " * 43 + ": ",
        "keep == KeepBits::kDraw   ? &shrink_kernel<T, kRanks, KeepBits::kDraw>\n          : ",
        "keep == KeepBits::kRead ? &shrink_kernel<T, kRanks, KeepBits::kRead>\n                                    : ",
        "masked ? &token_sum_kernel<T, kSmallRanks, true> : ",
        "masked ? &token_sum_kernel<T, kRanks, true> : ",
        "case 2: return start(launch, larger ? &few_tokens_kernel<T, 2, 3> : &few_tokens_kernel<T, 2, 2>, params);",
        "default: return start(launch, larger ? &few_tokens_kernel<T, 4, 3> : &few_tokens_kernel<T, 4, 2>, params);",
    ],
}


@functools.cache
def library() -> Library:
    """Builds the kernels with all bugs planted, none of them active."""
    left_out = [Edit(f"csrc/cuda/{path}", text, "") for path, texts in NOT_RUN.items() for text in texts]
    edits = (*left_out, *(mutation.edit for mutation in MUTATIONS))
    mutants = edited_kernels("planted", edits, SOURCES, (SIMT / "mutants" / "planted.cpp",))
    mutants.multiprocessors = FEW_MULTIPROCESSORS
    return mutants


@contextlib.contextmanager
def planted(mutation: KernelMutation) -> Iterator[Library]:
    library().c.simt_plant(mutation.name.encode())
    try:
        yield library()
    finally:
        library().c.simt_plant(b"")
