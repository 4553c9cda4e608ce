"""The part of the table in support/refusals.py for the functions of lora_ext.analysis."""

from __future__ import annotations

from typing import Any

import torch
from support.public_calls import NAN, Call

from lora_ext import analysis


def factors() -> dict[str, Any]:
    return {"lora_A": torch.randn(2, 6), "lora_B": torch.randn(4, 2), "scaling": 0.5}


ANALYSIS: list[Call] = [
    Call(
        analysis.factored_svd,
        lambda _: factors(),
        [
            ({"lora_A": torch.randn(3, 6)}, ValueError, "factored_svd: lora_B has rank 2 but lora_A has 3"),
            ({"lora_A": torch.randn(6)}, ValueError, "factored_svd: lora_A has shape [6], want 2 dimensions"),
            ({"scaling": NAN}, ValueError, "factored_svd: lora_A, lora_B or scaling nan is not finite"),
            (
                {"lora_B": torch.full((4, 2), NAN)},
                ValueError,
                "factored_svd: lora_A, lora_B or scaling 0.5 is not finite",
            ),
        ],
    ),
    Call(
        analysis.block_krylov_svd,
        lambda _: {"weight": torch.randn(6, 4), "rank": 2, "seed": 0},
        [
            ({"weight": torch.randn(6)}, ValueError, "weight has shape [6], want 2 dimensions"),
            ({"weight": torch.full((6, 4), NAN)}, ValueError, "weight [6, 4] is not finite"),
            ({"rank": 5}, ValueError, "block_krylov_svd: rank is 5, want 1 to 4, the smaller side of the weight"),
        ],
    ),
    Call(
        analysis.project,
        lambda _: {"weight": torch.randn(6, 4), "U": torch.randn(6, 2), "V": torch.randn(4, 2)},
        [
            ({"U": torch.randn(4, 2)}, ValueError, "project: U [4, 2] and V [4, 2] do not fit the weight [6, 4]"),
            ({"V": torch.randn(4)}, ValueError, "V has shape [4], want 2 dimensions"),
        ],
    ),
    Call(
        analysis.projection_table,
        lambda _: {
            "weight": torch.randn(4, 6),
            "update": analysis.factored_svd(**factors()),
            "seed": 0,
            "weight_svd": None,
        },
        [
            ({"weight": torch.randn(6, 4)}, ValueError, "update has shape [4, 6] but weight has [6, 4]"),
            (
                {"weight_svd": analysis.block_krylov_svd(torch.randn(4, 6), 1, seed=0)},
                ValueError,
                "weight_svd has 1 directions, want at least the 2 of update",
            ),
        ],
    ),
    Call(
        analysis.expected_random_norm,
        lambda _: {"weight_norm": 2.0, "out_features": 6, "in_features": 4, "r": 2},
        [({"r": 5}, ValueError, "r is 5"), ({"in_features": 0}, ValueError, "in_features=0")],
    ),
    Call(analysis.leading_ranks, lambda _: {"count": 5}, [({"count": -1}, ValueError, "count is -1, want at least 0")]),
    *(
        Call(
            function,
            lambda _, more=more: {"singular_values": torch.tensor([2.0, 1.0]), **more},
            [
                ({"singular_values": torch.ones(2, 2)}, ValueError, "[2, 2], want a vector of real numbers"),
                ({"singular_values": torch.tensor([1.0, 2.0])}, ValueError, "descending order; sort them first"),
                ({"singular_values": torch.tensor([1.0, NAN])}, ValueError, "singular_values must be finite"),
                *([({"energy": 1.5}, ValueError, "energy_rank: energy is 1.5, want 0 < energy <= 1")] if more else []),
            ],
        )
        for function, more in (
            (analysis.effective_rank, {}),
            (analysis.stable_rank, {}),
            (analysis.numerical_rank, {}),
            (analysis.energy_rank, {"energy": 0.5}),
        )
    ),
    Call(
        analysis.singular_basis,
        lambda _: {"matrix": torch.randn(2, 6)},
        [
            ({"matrix": torch.full((2, 6), NAN)}, ValueError, "matrix [2, 6] is not finite"),
            ({"matrix": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "matrix has dtype int64, want one of"),
        ],
    ),
    Call(
        analysis.subspace_similarity,
        lambda _: {"first": torch.eye(4)[:, :2], "second": torch.eye(4)[:, 1:]},
        [({"second": torch.eye(5)}, ValueError, "subspace_similarity: second has 5 rows but first has 4")],
    ),
    *(
        Call(
            function,
            lambda _: {"i_max": 2, "j_max": 3, "dim": 4},
            [
                ({"i_max": 5}, ValueError, "i_max is 5, want 0 to dim=4"),
                ({"j_max": -1}, ValueError, "j_max is -1, want 0 to dim=4"),
            ],
        )
        for function in (analysis.expected_random_similarity, analysis.random_similarity_std)
    ),
    Call(
        analysis.orthonormal_columns,
        lambda _: {"dim": 4, "count": 2, "generator": torch.Generator()},
        [({"count": 5}, ValueError, "orthonormal_columns: count is 5, want 0 to dim=4")],
    ),
]
