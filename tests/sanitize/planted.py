"""A bug to plant in the generic kernels for each sanitizer, and the report that it must give."""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "csrc/cpu/isa_generic.cpp"
"""The source that includes the edited files."""
CALL = """
import os, torch
from lora_ext import functional
torch.set_num_threads(2)
torch.manual_seed(0)
x, weight, A, B = (torch.randn(size) for size in ((100, 70), (40, 70), (5, 70), (40, 5)))
for _ in range(20):  # one thread may do the work of both before the other wakes up, and then there is no race
    functional.lora_linear(x, weight, None, A, B, 1.0, 0.5)
"""
_CHUNKS = "csrc/cpu/layer.inc"


@dataclass(frozen=True)
class PlantedBug:
    """An edit of a file, in which ``old`` occurs once, and the first report's text and place."""

    path: str  # relative to the repository's root
    old: str
    new: str
    report: str
    place: str  # the file that the report names

    def applied(self, text: str) -> str:
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.path} has the text to replace {count} times, want once: {self.old!r}")
        return text.replace(self.old, self.new)


PLANTED = {
    "asan": PlantedBug(
        _CHUNKS,
        "f(row, smaller(rows.end - row, together));",
        "f(row, smaller(rows.end - row + 1, together));",
        "heap-buffer-overflow",
        "csrc/cpu/",
    ),
    "ubsan": PlantedBug(
        _CHUNKS,
        "const int64_t begin = blocks * chunk / num_chunks * kBlockRows;",
        "const int64_t begin = blocks * (chunk + INT64_MAX) / num_chunks * kBlockRows;",
        "signed integer overflow",
        _CHUNKS,
    ),
    "tsan": PlantedBug(
        _CHUNKS,
        "return {begin, smaller(end, rows)};",
        "return {begin - (chunk > 0), smaller(end, rows)};",
        "data race",
        "csrc/cpu/",
    ),
}
