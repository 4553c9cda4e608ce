"""Runs the merge kernels on torch tensors, many layers in one call, as the ops of csrc/bindings do.

Nothing changes in place: functions return the weights after the launch. Every run checks that tests/simt reports
nothing, that nothing was written between the rows of a weight, and that every word of a record was written.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from support.merging import same_bits
from torch import Tensor

from lora_ext._ops.checks import merge_segments

from . import params
from .driver import Library, kernels
from .ops import DTYPES

FIRST_ROW = 3  # of layer i of a stochastic merge, times i


class Mode(IntEnum):  # csrc/common/merge_params.h
    PLAN, MERGE, MERGE_RECORD, UNMERGE = range(4)


def num_segments(weight: Tensor) -> int:
    return weight.shape[0] * merge_segments(weight.shape[1])


def plan(*layers: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the number of non-finite results [layers], and the words of every segment's record [segments]."""
    run = _Run(*layers, **options)
    run.count_words()
    weights_after = run.launch(Mode.PLAN)
    for weight, after in zip(run.weights, weights_after, strict=True):
        assert same_bits(weight, after), "the plan wrote to a weight"
    return run.counts()


def check(*layers: list[Tensor], **options: Any) -> Tensor:
    """Returns the number of non-finite results [layers], as ``lora_merge_check`` does: without words."""
    run = _Run(*layers, **options)
    non_finite = run.library.upload(torch.zeros(len(run.weights), dtype=torch.int64), "non_finite")
    for i, layer in enumerate(run.layers):
        layer.non_finite = non_finite + 8 * i
    run.launch(Mode.PLAN)
    return run.library.download(non_finite, (len(run.weights),), torch.int64, "non_finite")


def merge(*layers: list[Tensor], **options: Any) -> list[Tensor]:
    return _Run(*layers, **options).launch(Mode.MERGE)


def merge_record(
    *layers: list[Tensor], ends: Tensor, corrections: list[Tensor] | list[int], garbage: bool = False, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the merged weights and their corrections.

    corrections: their lengths, or their initial contents. garbage: `ends` does not fit, and lanes may race.
    """
    run = _Run(*layers, **options)
    run.set_record(ends, corrections, garbage)
    return run.launch(Mode.MERGE_RECORD), run.corrections()


def unmerge(
    *layers: list[Tensor],
    ends: Tensor | None = None,
    corrections: Sequence[Tensor] = (),
    garbage: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Returns the unmerged weights. garbage: the record comes from no merge, and lanes may race."""
    run = _Run(*layers, **options)
    if ends is not None:
        run.set_record(ends, corrections, garbage)
    return run.launch(Mode.UNMERGE)


class _Run:
    """A call: its parameters, and its layers in device memory.

    Args:
        weights, As, Bs: one entry for each layer, as the functions above take them.
        schedule, library, seeds: their options. The order of threads, what runs them, and for each layer the seed of
            its stochastic rounding.
    """

    def __init__(
        self,
        weights: list[Tensor],
        As: list[Tensor],
        Bs: list[Tensor],
        schedule: int = 0,
        library: Library | None = None,
        seeds: list[int] | None = None,
    ):
        self.library = library or kernels()
        self.library.reset(schedule)
        self.weights = weights
        self.params = params.MergeParams(dtype=DTYPES[weights[0].dtype], stochastic=seeds is not None)
        self.layers = (params.MergeLayer * len(weights))()
        first_segment = 0
        for layer, weight, A, B in zip(self.layers, weights, As, Bs, strict=True):
            layer.out_features, layer.in_features = weight.shape
            layer.rank, layer.weight_stride = A.shape[0], weight.stride(0)
            layer.weight = self.library.upload(weight, "weight")
            layer.lora_A, layer.lora_B = self.library.upload(A, "lora_A"), self.library.upload(B, "lora_B")
            layer.first_segment = first_segment
            first_segment += num_segments(weight)
        for i, (layer, seed) in enumerate(zip(self.layers, seeds or [], strict=False)):
            layer.seed, layer.first_row = seed, FIRST_ROW * i

    def set_record(self, ends: Tensor, corrections: list[Tensor] | list[int], garbage: bool) -> None:
        if garbage:
            self.library.allow_races()
        self.params.ends = self.library.upload(ends, "ends")
        for layer, record in zip(self.layers, corrections, strict=True):
            if isinstance(record, int):
                layer.num_corrections = record
                layer.corrections = self.library.allocate(record * 2, "corrections")
            else:
                layer.num_corrections = record.numel()
                layer.corrections = self.library.upload(record, "corrections")

    def count_words(self) -> None:
        """Lets the next launch count words and results that are not finite."""
        self.totals = self.library.upload(torch.zeros(2 * len(self.layers), dtype=torch.int64), "counts")
        self.words = self.library.allocate(2 * sum(map(num_segments, self.weights)), "words")
        for i, layer in enumerate(self.layers):
            layer.non_finite = self.totals + 8 * i
            layer.num_words = self.totals + 8 * (len(self.layers) + i)
            layer.words = self.words and self.words + 2 * layer.first_segment

    def counts(self) -> tuple[Tensor, Tensor]:
        """Returns the number of non-finite results [layers], and the words [segments]; their sums were counted, too."""
        segments, layers = [*map(num_segments, self.weights)], len(self.layers)
        words = self.library.download(self.words, (sum(segments),), torch.int16, "words")
        totals = self.library.download(self.totals, (2 * layers,), torch.int64, "counts")
        assert totals[layers:].tolist() == [int(part.sum()) for part in words.split(segments)]
        return totals[:layers], words

    def corrections(self) -> list[Tensor]:
        return [
            self.library.download(layer.corrections, (layer.num_corrections,), torch.int16, "corrections")
            for layer in self.layers
        ]

    def launch(self, mode: Mode) -> list[Tensor]:
        """Returns the weights after the launch."""
        run = self.library.c.run_merge
        run.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
        run(mode, ctypes.byref(self.params), self.layers, len(self.layers), self.library.sms)
        self.library.check()
        return [
            self.library.download_rows(layer.weight, weight, "weight") if weight.numel() else weight.clone()
            for layer, weight in zip(self.layers, self.weights, strict=True)
        ]
