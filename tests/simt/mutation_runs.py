"""A bug to plant in a kernel, and runs that execute it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from support.groups import random_groups
from torch import Tensor

from . import grouped_ops, merge_ops, ops
from .driver import Library
from .edits import Edit

BF16, F32 = torch.bfloat16, torch.float32


class Report(NamedTuple):
    """The first report of a run, whatever the order of threads."""

    kinds: tuple[str, ...]
    kernel: str
    at: str  # occurs in the line that the report names
    path: str = ""  # the file of that line, relative to csrc/cuda, if not the mutation's


@dataclass(frozen=True)
class KernelMutation:
    """An edit, and a run that executes it."""

    name: str
    run: Callable[[Library, int], object]
    path: str  # of the edit, relative to csrc/cuda
    change: str  # text that occurs exactly once; {+...+} is inserted, in which BUG stands for "this bug is active"
    report: Report

    @property
    def edit(self) -> Edit:
        added = re.findall(r"\{\+(.*?)\+\}", self.change, re.DOTALL)
        assert added and "\n" not in "".join(added), f"{self.name} moves lines, or adds nothing"
        new = self.change.replace("{+", "").replace("+}", "").replace("BUG", f'simt::planted("{self.name}")')
        return Edit(f"csrc/cuda/{self.path}", re.sub(r"\{\+.*?\+\}", "", self.change), new)


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def _sibling(dtype: torch.dtype, in_features: int, out_features: int, rank: int) -> ops.Sibling:
    return ops.Sibling(_random(rank, in_features, dtype=dtype), _random(out_features, rank, dtype=dtype), 1.0)


def forward(dtype: torch.dtype, tokens: int, in_features: int, out_features: int, rank: int):
    def run(library: Library, schedule: int) -> None:
        x, sibling = _random(tokens, in_features, dtype=dtype), _sibling(dtype, in_features, out_features, rank)
        ops.lora_forward(x, [sibling], library=library, schedule=schedule)

    return run


def few_tokens(tokens: int, in_features: int, out_features: int, rank: int):
    def run(library: Library, schedule: int) -> None:
        x, sibling = _random(tokens, in_features, dtype=BF16), _sibling(BF16, in_features, out_features, rank)
        weights = [_random(out_features, in_features, dtype=BF16)]
        ops.lora_forward(x, [sibling], weights=weights, library=library, schedule=schedule)

    return run


def backward(dtype: torch.dtype, tokens: int, in_features: int, out_features: int, rank: int, wanted: str):
    """Returns a run of a backward. wanted: a part of "xAB", the gradients of x, lora_A and lora_B."""

    def run(library: Library, schedule: int) -> None:
        x, grad_y = _random(tokens, in_features, dtype=dtype), _random(tokens, out_features, dtype=dtype)
        sibling, xa = _sibling(dtype, in_features, out_features, rank), _random(tokens, rank)
        output_mask = tuple(name in wanted for name in "xAB")
        ops.lora_backward([grad_y], x, [sibling], xa, output_mask=output_mask, library=library, schedule=schedule)

    return run


def grouped(dtype: torch.dtype, groups: list[int], features: tuple[int, int], rank: int, is_backward: bool = False):
    """Returns a run of lora_grouped_ or of its backward. groups: the number of rows of each group."""

    def run(library: Library, schedule: int) -> None:
        torch.manual_seed(1)
        choice = torch.arange(len(groups)).repeat_interleave(torch.tensor(groups))
        case = random_groups(len(choice), features, [rank] * len(groups), (dtype, dtype), groups=choice)
        if is_backward:
            xa = _random(len(choice), rank)
            grouped_ops.backward(case, xa, library=library, schedule=schedule)
        else:
            grouped_ops.forward(case, library=library, schedule=schedule)

    return run


def merge(rows: int, cols: int, rank: int):
    def run(library: Library, schedule: int) -> None:
        merge_ops.merge([_random(rows, cols)], [_random(rank, cols)], [_random(rows, rank)], schedule, library)

    return run


def merge_record(rows: int, cols: int, rank: int):
    def run(library: Library, schedule: int) -> None:
        layers = [_random(rows, cols)], [_random(rank, cols)], [_random(rows, rank)]
        _, words = merge_ops.plan(*layers, schedule, library)
        merge_ops.merge_record(*layers, words.cumsum(0), [int(words.sum())], schedule, library)

    return run


def unmerge(library: Library, schedule: int) -> None:
    """Unmerges a row in which every element has a correction."""
    cols = 256
    words = torch.arange(cols, dtype=torch.int16) + 256
    arguments = [_random(1, cols)], [_random(2, cols)], [_random(1, 2)]
    merge_ops.unmerge(*arguments, torch.tensor([cols]), [words], schedule, library)
