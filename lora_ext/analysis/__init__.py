"""Analyses of what an adapter learned, as in section 7 and appendix H of the LoRA paper (arXiv 2106.09685).

All functions take tensors. They use the factors of an update, never the product, and multiply the weight with a few
vectors only.
"""

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
