"""Measures what an adapter learned, as section 7 of the LoRA paper does: from tensors, without an update's product."""

from lora_ext.analysis.decomposition import Svd, block_krylov_svd, factored_svd
from lora_ext.analysis.projection import ProjectionTable, expected_random_norm, leading_ranks, project, projection_table
from lora_ext.analysis.subspace import (
    effective_rank,
    energy_rank,
    expected_random_similarity,
    numerical_rank,
    orthonormal_columns,
    random_similarity_std,
    singular_basis,
    stable_rank,
    subspace_similarity,
)

__all__ = [
    "ProjectionTable",
    "Svd",
    "block_krylov_svd",
    "effective_rank",
    "energy_rank",
    "expected_random_norm",
    "expected_random_similarity",
    "factored_svd",
    "leading_ranks",
    "numerical_rank",
    "orthonormal_columns",
    "project",
    "projection_table",
    "random_similarity_std",
    "singular_basis",
    "stable_rank",
    "subspace_similarity",
]
