"""Compares lora_ext.analysis with numpy on whole matrices: updates are multiplied out and decomposed."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from support.properties import given, settings, st
from torch import Tensor

from lora_ext.analysis import (
    block_krylov_svd,
    effective_rank,
    energy_rank,
    expected_random_norm,
    expected_random_similarity,
    factored_svd,
    leading_ranks,
    numerical_rank,
    orthonormal_columns,
    project,
    projection_table,
    random_similarity_std,
    singular_basis,
    stable_rank,
    subspace_similarity,
)

pytestmark = pytest.mark.cpu_only("compares with numpy")


def factors(out: int, in_: int, r: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(r, in_, dtype=dtype), torch.randn(out, r, dtype=dtype)


def naive_similarity(U: np.ndarray, V: np.ndarray, i: int, j: int) -> float:
    """The formula exactly as in the paper."""
    return np.linalg.norm(U[:, :i].T @ V[:, :j], "fro") ** 2 / min(i, j)


SIZES = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24))


@settings(deadline=None, max_examples=60)
@given(SIZES, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.sampled_from([1.0, -0.5, 4.0]))
def test_factored_svd_equals_the_svd_of_the_product(sizes, dtype, scaling):
    out, in_, r = sizes
    torch.manual_seed(out + 100 * in_)
    A, B = factors(out, in_, r, dtype)
    delta = scaling * (B.double() @ A.double())
    found = factored_svd(A, B, scaling)
    expected = np.linalg.svd(delta.numpy(), compute_uv=False)
    count = min(out, in_, r)
    assert found.U.shape == (out, count) and found.S.shape == (count,) and found.V.shape == (in_, count)
    np.testing.assert_allclose(found.S.numpy(), expected[:count], atol=1e-12 * expected[0], rtol=1e-12)
    assert found.S.dtype == torch.float64
    torch.testing.assert_close((found.U * found.S) @ found.V.T, delta)
    for basis in (found.U, found.V):
        torch.testing.assert_close(basis.T @ basis, torch.eye(count, dtype=torch.float64))


# --- subspaces --------------------------------------------------------------------------------------------------------


def test_the_basis_holds_right_singular_vectors_by_descending_singular_value():
    A = torch.randn(5, 30)
    basis = singular_basis(A)
    _, _, Vh = np.linalg.svd(A.double().numpy(), full_matrices=False)
    assert basis.shape == (30, 5)
    np.testing.assert_allclose(np.abs(np.sum(basis.numpy() * Vh.T, axis=0)), 1.0, atol=1e-10)


def test_the_basis_omits_linearly_dependent_directions():
    A = torch.randn(3, 30)
    assert singular_basis(torch.cat([A, A[:1] + A[1:2]])).shape == (30, 3)
    assert singular_basis(torch.zeros(4, 30)).shape == (30, 0)
    assert singular_basis(torch.randn(7, 4)).shape == (4, 4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(8, 30), st.integers(0, 1000))
def test_similarity_is_the_papers_formula_on_the_whole_grid(r, other, dim, seed):
    torch.manual_seed(seed)
    A, other_A = torch.randn(r, dim), torch.randn(other, dim)
    phi = subspace_similarity(singular_basis(A), singular_basis(other_A))
    U, V = (np.linalg.svd(a.double().numpy(), full_matrices=False)[2].T for a in (A, other_A))
    expected = [[naive_similarity(U, V, i, j) for j in range(1, other + 1)] for i in range(1, r + 1)]
    np.testing.assert_allclose(phi.numpy(), expected, atol=1e-9)
    assert phi.min() >= 0 and phi.max() <= 1
    torch.testing.assert_close(subspace_similarity(singular_basis(other_A), singular_basis(A)), phi.T)


def test_random_subspaces_are_as_similar_as_expected():
    dim, i_max, j_max, draws = 12, 3, 5, 1000
    generator = torch.Generator().manual_seed(0)
    phi = torch.stack(
        [
            subspace_similarity(orthonormal_columns(dim, i_max, generator), orthonormal_columns(dim, j_max, generator))
            for _ in range(draws)
        ]
    )
    expected, std = expected_random_similarity(i_max, j_max, dim), random_similarity_std(i_max, j_max, dim)
    assert expected[0, 0] == 1 / 12 and expected[2, 4] == 5 / 12
    assert ((phi.mean(0) - expected).abs() < 5 * std / draws**0.5).all()
    # The standard error of a standard deviation, for the measured kurtosis.
    kurtosis = ((phi - phi.mean(0)) / phi.std(0)).pow(4).mean(0)
    assert ((phi.std(0) - std).abs() < 5 * std * ((kurtosis - 1) / (4 * draws)) ** 0.5).all()


def test_in_a_full_space_random_subspaces_do_not_differ():
    assert torch.equal(expected_random_similarity(2, 4, 4)[:, 3], torch.ones(2, dtype=torch.float64))
    assert torch.equal(random_similarity_std(2, 4, 4)[:, 3], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(random_similarity_std(1, 1, 1), torch.zeros(1, 1, dtype=torch.float64))
    # Two directions of a plane: the squared cosine of a uniform angle.
    assert random_similarity_std(1, 1, 2).item() == pytest.approx(math.sqrt(1 / 8))
    with pytest.raises(ValueError, match="expected_random_similarity: j_max is 5, want 0 to dim=4"):
        expected_random_similarity(2, 5, 4)


def test_ranks_of_a_spectrum_by_hand():
    S = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert effective_rank(S) == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert stable_rank(S) == pytest.approx(6 / 4)
    assert [energy_rank(S, part) for part in (0.5, 4 / 6, 0.8, 0.9, 1.0)] == [1, 1, 2, 3, 3]
    assert numerical_rank(S) == 3
    equal = torch.full((7,), 0.3)
    assert [effective_rank(equal), stable_rank(equal)] == pytest.approx([7, 7]) and energy_rank(equal, 1.0) == 7
    for S in (torch.zeros(4), torch.zeros(0)):
        assert effective_rank(S) == stable_rank(S) == energy_rank(S, 0.9) == numerical_rank(S) == 0


# --- the weight -------------------------------------------------------------------------------------------------------


@functools.cache
def descending(out: int, in_: int, power: float) -> Tensor:
    """A matrix with singular values that decay like those of trained weights."""
    count = min(out, in_)
    generator = torch.Generator().manual_seed(7)
    singular = torch.arange(1, count + 1, dtype=torch.float64) ** -power
    U, V = orthonormal_columns(out, count, generator), orthonormal_columns(in_, count, generator)
    return (U * singular) @ V.T


@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (5, 3)])
def test_small_weights_are_decomposed_in_full(shape):
    W = torch.randn(*shape)
    rank = min(shape)
    found = block_krylov_svd(W, rank, seed=0)
    np.testing.assert_allclose(found.S.numpy(), np.linalg.svd(W.numpy(), compute_uv=False), rtol=1e-5)
    torch.testing.assert_close(((found.U * found.S) @ found.V.T).float(), W)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "power"), [((520, 600), 1.0), ((600, 520), 0.3)])
@pytest.mark.full
def test_leading_directions_of_large_weights(shape, power, dtype):
    W = descending(*shape, power).to(dtype)
    found = block_krylov_svd(W, 8, seed=0)
    U, S, Vh = np.linalg.svd(W.double().numpy(), full_matrices=False)
    assert (found.U.shape, found.V.shape) == ((shape[0], 8), (shape[1], 8))
    # Never above the true values, and close to them.
    assert (found.S.numpy() <= S[:8] * (1 + 1e-5)).all()
    np.testing.assert_allclose(found.S.numpy(), S[:8], rtol=2e-3)
    for basis, best in ((found.U, U), (found.V, Vh.T)):
        torch.testing.assert_close(basis.T @ basis, torch.eye(8, dtype=torch.float64), atol=1e-6, rtol=0)
        assert subspace_similarity(basis, torch.from_numpy(best[:, :8].copy()))[7, 7] > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_projection_is_the_product(dtype, monkeypatch):
    monkeypatch.setattr("lora_ext.analysis.decomposition.ELEMENTS_PER_THREAD", 7 * 23)  # rows do not divide into blocks
    W = torch.randn(40, 23).to(dtype)
    U, V = orthonormal_columns(40, 3, torch.Generator()), orthonormal_columns(23, 5, torch.Generator())
    expected = U.T @ W.double() @ V
    torch.testing.assert_close(project(W, U, V), expected, atol=1e-5, rtol=1e-5)


# --- Table 7 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [1.0, -2.0])
def test_the_table_equals_the_computation_on_whole_matrices(scaling):
    A, B = factors(30, 20, 6, torch.float32)
    W = torch.randn(30, 20)
    table = projection_table(W, factored_svd(A, B, scaling), seed=3)
    assert table.ranks == [1, 2, 4, 6]
    delta = (scaling * B @ A).double().numpy()
    weight = W.double().numpy()
    (U, S, Vh), (weight_U, _, weight_Vh) = (np.linalg.svd(m, full_matrices=False) for m in (delta, weight))
    for k, r in enumerate(table.ranks):
        projected = np.linalg.norm(U[:, :r].T @ weight @ Vh[:r].T)
        assert table.delta[k] == pytest.approx(projected, rel=1e-4)
        assert table.weight[k] == pytest.approx(np.linalg.norm(weight_U[:, :r].T @ weight @ weight_Vh[:r].T), rel=1e-4)
        assert table.amplification[k] == pytest.approx(np.linalg.norm(S[:r]) / projected, rel=1e-4)
        assert table.random_expected[k] == pytest.approx(r * np.linalg.norm(weight) / math.sqrt(600), rel=1e-6)
    assert table.weight_norm == pytest.approx(np.linalg.norm(weight), rel=1e-6)
    assert table.delta_norm == pytest.approx(np.linalg.norm(delta), rel=1e-6)
    assert table.amplification[-1] == pytest.approx(table.delta_norm / table.delta[-1])


def test_an_update_orthogonal_to_the_weight_and_a_zero_update():
    W = torch.zeros(6, 8)
    W[0, 0] = 2.0
    A, B = torch.zeros(1, 8), torch.zeros(6, 1)
    A[0, 1] = B[3, 0] = 1.0
    table = projection_table(W, factored_svd(A, B), seed=0)
    assert table.delta == [0.0] and table.amplification == [math.inf]
    assert [leading_ranks(count) for count in (0, 1, 2, 6, 8)] == [[], [1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    nothing = projection_table(W, factored_svd(A, B * 0), seed=0)
    assert nothing.ranks == [] and nothing.amplification == [] and nothing.delta_norm == 0


def test_random_directions_meet_the_expected_part_of_the_weight():
    W = torch.randn(12, 9)
    A, B = factors(12, 9, 4)
    delta = factored_svd(A, B)
    squares = torch.tensor([projection_table(W, delta, seed=seed).random for seed in range(100)]).double() ** 2
    expected = torch.tensor([expected_random_norm(W.norm().item(), 12, 9, r) for r in (1, 2, 4)]) ** 2
    error = squares.std(0) / 100**0.5
    assert ((squares.mean(0) - expected).abs() < 5 * error).all()
