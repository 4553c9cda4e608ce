"""Bugs to plant in the kernels and bindings, and the reports that sanitizers must give.

All bugs of a sanitizer are in one library, and an environment variable enables one of them: so the library is compiled
only once more. Only the generic kernels have bugs.
"""

from __future__ import annotations

from dataclasses import dataclass

VARIABLE = "LORA_EXT_PLANTED"

PLANTED_HEADER = f"""#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
namespace lora_ext {{
[[maybe_unused]] static bool is_planted(const char* name) {{
  const char* planted = std::getenv("{VARIABLE}");
  return planted != nullptr && std::strcmp(planted, name) == 0;
}}
}}  // namespace lora_ext
"""


@dataclass(frozen=True)
class Edit:
    path: str  # relative to the repository's root
    old: str  # occurs exactly once
    new: str  # BUG stands for whether it is enabled

    def applied(self, text: str, name: str) -> str:
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{name}: {self.path} has the text to replace {count} times, want once: {self.old!r}")
        return text.replace(self.old, self.new.replace("BUG", f'lora_ext::is_planted("{name}")'))


@dataclass(frozen=True)
class PlantedBug:
    """An edit, the call that triggers it, and the first report's text and place."""

    name: str
    edit: Edit
    source: str  # the source that includes the edited file
    call: str
    report: str
    place: str  # the file that the report names


_GENERIC, _MERGE = "csrc/cpu/isa_generic.cpp", "csrc/bindings/cpu_merge.cpp"
_LORA, _CHUNKS = "csrc/cpu/shrink_expand.inc", "csrc/cpu/shrink_expand_chunks.inc"

PREAMBLE = """
import os, torch
from lora_ext import functional
torch.set_num_threads(2)
torch.manual_seed(0)
x, weight, A, B = (torch.randn(size) for size in ((100, 70), (40, 70), (5, 70), (40, 5)))
"""
_FORWARD = "functional.lora_linear(x, weight, None, A, B, 1.0, 0.5)"
_BACKWARD = "functional.lora_linear(x, weight, None, A.requires_grad_(), B.requires_grad_(), 1.0).sum().backward()"
_MERGING = (
    "functional.lora_merge_(torch.randn(400, 300), torch.randn(5, 300), torch.randn(400, 5), 1.0)"  # two chunks of rows
)

_COUNT = "f(row, {});"
_SUMS = "return static_cast<Acc*>(sums) + {} * rank * stride;"
_RANGE = "return {{{}, smaller(end, rows)}};"
_CHUNK_END = "chunk.end = rows * (i + 1) / num_chunks_{};"
_PANEL_TAIL = "std::memset(to + cols, 0, sizeof(Acc) * static_cast<size_t>(kMergeSegment - cols{}));"
_SHIFT = "return kStep < 8 ? word >> (col % 8{}) : word;"
_BLOCKS = "const int64_t begin = blocks * {} / num_chunks * kBlockRows;"
_SEED = "static_cast<uint64_t>(*{}) : 0);"
_HAS_SEED = "const PhiloxKeys keys(p.threshold > 0{} ? "


def _edit(path: str, pattern: str, old: str, new: str) -> Edit:
    return Edit(path, pattern.format(old), pattern.format(new))


PLANTED: dict[str, list[PlantedBug]] = {
    "asan": [
        PlantedBug(
            "read_and_written_past_the_last_row",
            _edit(_CHUNKS, _COUNT, "smaller(rows.end - row, kBlockRows)", "smaller(rows.end - row + BUG, kBlockRows)"),
            _GENERIC,
            _FORWARD,
            "heap-buffer-overflow",
            "csrc/cpu/",
        ),
        PlantedBug(
            "scratch_memory_written_past_its_end",
            _edit("csrc/cpu/merge.inc", _PANEL_TAIL, "", " + BUG"),
            _GENERIC,
            _MERGING,
            "heap-buffer-overflow",
            "csrc/cpu/merge.inc",
        ),
    ],
    "ubsan": [
        PlantedBug(
            "signed_overflow",
            _edit(_CHUNKS, _BLOCKS, "chunk", "(chunk + (BUG ? INT64_MAX : 0))"),
            _GENERIC,
            _FORWARD,
            "signed integer overflow",
            _CHUNKS,
        ),
        PlantedBug(
            "shift_too_far",
            _edit("csrc/cpu/blocks.inc", _SHIFT, "", " + (BUG ? 32 : 0)"),
            _GENERIC,
            _FORWARD,
            "shift exponent",
            "csrc/cpu/blocks.inc",
        ),
        PlantedBug(
            "misaligned_read",
            _edit(_LORA, _SEED, "p.seed", "(const int64_t*)((const char*)p.seed + BUG)"),
            _GENERIC,
            _FORWARD,
            "misaligned address",
            _LORA,
        ),
        PlantedBug(
            "null_pointer",
            _edit(_LORA, _HAS_SEED, "", " || BUG"),
            _GENERIC,
            _FORWARD.replace(", 0.5)", ")"),
            "null pointer",
            _LORA,
        ),
    ],
    "tsan": [
        PlantedBug(
            "two_chunks_write_one_row",
            _edit(_CHUNKS, _RANGE, "begin", "begin - (BUG && chunk > 0)"),
            _GENERIC,
            _FORWARD,
            "data race",
            "csrc/cpu/",
        ),
        PlantedBug(
            "two_chunks_sum_into_one_place",
            _edit(_LORA, _SUMS, "chunk", "(BUG ? 0 : chunk)"),
            _GENERIC,
            _BACKWARD,
            "data race",
            "csrc/cpu/",
        ),
        PlantedBug(
            "two_threads_merge_one_row",
            _edit("csrc/bindings/cpu_merge_run.h", _CHUNK_END, "", " + (BUG && i + 1 < num_chunks_)"),
            _MERGE,
            _MERGING,
            "data race",
            "csrc/cpu/merge",
        ),
    ],
}
