"""The stages of a layer on a GPU: what each must read, write and multiply, and how often it is launched.

Everything here is arithmetic on shapes. bench_kernels.py measures the stages, predictions.py predicts them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness import report
from harness.shapes import Shape

# Launches of one call in bfloat16 with a rank up to 16, by stage: the only place where they are counted. A call of more
# layers (siblings) has these once, except those in PER_LAYER, which it has for each layer. "seed" is PyTorch's random
# number, "product" the cuBLAS GEMM with the frozen weight. tests/simt/test_simt_plans.py counts the kernels.
FORWARD_LAUNCHES = {"seed": 1, "shrink": 1, "expand": 1, "product": 1}
BACKWARD_LAUNCHES = {"grad_b": 1, "grad_x": 1, "grad_a": 2, "product": 1}
PER_LAYER = ("product",)
# The forward of at most FEW_TOKENS tokens (csrc/cuda/mma/tile_sizes.h): one kernel has the product and the adapter.
FEW_TOKENS, FEW_TOKENS_LAUNCHES = 32, {"seed": 1, "shrink": 1, "few_tokens": 1}
ALLOCATIONS = {"forward": 4, "backward": 4}  # results and workspace of a call of one layer


@dataclass(frozen=True)
class Case:
    shape: Shape
    rank: int = 16
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.1
    factor_dtype: torch.dtype | None = None  # None: that of x

    def __str__(self) -> str:
        dropout = f", p={self.dropout}" if self.dropout else ""
        return f"{self.shape}, r={self.rank}, {report.dtype_name(self.dtype)}{dropout}"


# --- the model: what a stage must read, write and multiply ------------------------------------------------------------


def stage_bytes(case: Case) -> dict[str, int]:
    """Bytes of each stage: its tall matrix once, the mask's bits, and the skinny operands (float32; factors' dtype)."""
    tokens, features, outputs = case.shape
    wide = 8 if case.dtype == torch.float64 else 4
    element = case.dtype.itemsize
    mask = tokens * (-(-features // 64) * 8) if case.dropout else 0
    x, y, skinny = tokens * features * element, tokens * outputs * element, tokens * case.rank * wide
    A, B = (case.rank * width * (case.factor_dtype or case.dtype).itemsize for width in (features, outputs))
    return {
        "shrink": x + mask + A + skinny,
        "expand": y + B + skinny,
        "few_tokens": features * outputs * element + x + y + B + skinny,
        "grad_b": y + B + skinny + skinny + B,
        "grad_a": x + mask + skinny + A,
        "grad_x": x + mask + A + skinny,
        "merge": 2 * features * outputs * element + A + B,
        "unmerge": 2 * features * outputs * element + A + B,
    }


def stage_flops(case: Case) -> dict[str, int]:
    tokens, features, outputs = case.shape
    of_x, of_y = 2 * tokens * features * case.rank, 2 * tokens * outputs * case.rank
    merge = 2 * features * outputs * case.rank
    return {
        "shrink": of_x,
        "expand": of_y,
        "few_tokens": 2 * tokens * features * outputs + of_y,
        "grad_b": 2 * of_y,
        "grad_a": of_x,
        "grad_x": of_x,
        "merge": merge,
        "unmerge": merge,
    }


def floor_seconds(case: Case, stage: str, copy_rate: float, matrix_rate: float) -> float:
    """Lower bound of the time: bytes at the copy's rate, or products at the matrix product's."""
    return max(stage_bytes(case)[stage] / copy_rate, stage_flops(case)[stage] / matrix_rate)
