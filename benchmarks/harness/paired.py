"""How sure is a difference of two methods' accuracies on the same test texts?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def correct_answers(directories: Sequence[Path]) -> Tensor:
    """Reads ``predictions.jsonl`` of runs with one test set; returns bool ``[runs, texts]``: where a run is right.

    Texts are sorted by their line in the data.

    Raises:
        ValueError: the runs were tested on different texts.
    """
    runs, lines = [], None
    for directory in directories:
        with open(directory / "predictions.jsonl", encoding="utf-8") as file:
            rows = sorted((json.loads(line) for line in file), key=lambda row: row["line"])
        if lines is not None and lines != [row["line"] for row in rows]:
            raise ValueError(f"{directory} has other test texts than {directories[0]}")
        lines = [row["line"] for row in rows]
        runs.append([row["label"] == row["predicted"] for row in rows])
    return torch.tensor(runs)


def paired_difference(first: Tensor, second: Tensor, resamples: int = 4000) -> dict[str, float]:
    """Returns the mean accuracy of ``first`` minus that of ``second``, with a 95 % interval by the bootstrap.

    Each resample draws test texts, the same for both methods, and seeds of each method, with replacement. So the
    interval has both what other test texts and what other seeds would change. Few seeds make it too narrow.

    Args:
        first: bool ``[runs, texts]``, where each run is right (:func:`correct_answers`).
        second: the same for the other method; the number of runs may differ.
        resamples: number of resamples. The draws are the same in every call.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    draw = torch.Generator().manual_seed(0)
    texts = torch.randint(first.shape[1], (resamples, first.shape[1]), generator=draw)
    counts = torch.zeros(resamples, first.shape[1]).scatter_add_(1, texts, torch.ones(texts.shape))

    def means(right: Tensor) -> Tensor:
        of_runs = counts @ right.float().T / right.shape[1]  # [resamples, runs]
        return of_runs.gather(1, torch.randint(len(right), (resamples, len(right)), generator=draw)).mean(1)

    low, high = (means(first) - means(second)).quantile(torch.tensor([0.025, 0.975])).tolist()
    return {"mean": (first.double().mean() - second.double().mean()).item(), "low": low, "high": high}
