"""Combines the adapters of one layer with weights, by the kinds and formulas of PEFT's ``add_weighted_adapter``.

Only pruning followed by SVD (and ``svd_clamp``) forms the ``[out, in]`` update; the other kinds use only the factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

COMBINATIONS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_linear_svd",
    "dare_ties",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
"""The kinds of combination."""

Factors = tuple[Tensor, Tensor, float]
"""``lora_A``, ``lora_B`` and scaling of one adapter in one layer."""


def check_combination(
    kind: str,
    weights: Sequence[float],
    num_adapters: int,
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
) -> str:
    """Checks the settings of a combination of ``num_adapters`` adapters.

    Returns:
        The kind to use: ``"linear"`` for one adapter, as in PEFT; otherwise ``kind``.

    Raises:
        ValueError, TypeError: the message names the setting, its value and the accepted values.
    """
    if num_adapters < 1:
        raise ValueError("combine: adapters is empty; name at least one")
    if num_adapters == 1 and kind in COMBINATIONS:
        kind = "linear"
    _check_settings(kind, weights, num_adapters, density, majority_sign_method, svd_rank, svd_clamp)
    return kind


def combined_rank(kind: str, ranks: Sequence[int], svd_rank: int | None = None) -> int:
    """The rank of the combination: the sum for ``cat``, ``svd_rank`` or the largest for ``*svd``, else the common one.

    Raises:
        ValueError: the ranks differ, but the kind adds factors element by element.
    """
    if kind == "cat":
        return sum(ranks)
    if kind.endswith("svd"):
        return svd_rank or max(ranks)
    if len(set(ranks)) != 1:
        raise ValueError(
            f"combine: the adapters have ranks {list(ranks)}, but {kind} adds factors element by element and needs one "
            "rank; use cat or one of the svd kinds"
        )
    return ranks[0]


@torch.no_grad()
def combine_factors(
    kind: str,
    factors: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign_method: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    transposed: bool = False,
) -> Factors:
    """Combines the adapters of one layer, with ``delta_i = scaling_i * lora_B_i @ lora_A_i``:

    - ``linear``: sums ``lora_A`` and ``lora_B`` separately, weighted by ``sqrt(|w_i * scaling_i|)`` (with the sign on
      ``lora_A``). A rough approximation of the sum of the deltas, whose rank is higher.
    - ``cat``: concatenates the factors; exactly ``sum w_i * delta_i``.
    - ``svd``: the best approximation of that sum of rank ``svd_rank``, by QR of the factors and SVD of a small core.
    - ``ties`` (arXiv 2306.01708), ``dare_linear``, ``dare_ties`` (arXiv 2311.03099), ``magnitude_prune``: keep only a
      fraction ``density`` of each factor (its largest values, or for dare random ones, divided by ``density``), then
      add as ``linear`` does; ties drops values whose sign is not the majority's, and averages the rest. As in PEFT, the
      random masks come from torch's default generator: equal seeds give equal masks.
    - the same with ``_svd``: prune and add the deltas themselves (formed in full), then SVD.

    Args:
        kind: one of :data:`COMBINATIONS`, as returned by :func:`check_combination`.
        factors: for each adapter that this layer has: ``lora_A [r, in, *kernel]``, ``lora_B [out, r / groups, *ones]``,
            floating point, and scaling. For an embedding, ``lora_embedding_A`` and ``lora_embedding_B``.
        weights: one per adapter; negative ones subtract.
        density: fraction of values to keep, in (0, 1]; for the kinds that prune.
        majority_sign_method: elects the sign for ties by the ``"total"`` of the values or the ``"frequency"`` of signs.
        svd_rank: rank of ``*svd``, by default the largest of the adapters'. Above the sum's own rank, the factors are
            padded with zeros.
        svd_clamp: clamps both factors of ``*svd`` to this quantile of their values. The result depends on the signs of
            the singular vectors, so they are computed from the full delta, as in PEFT.
        svd_full_matrices: no effect (only the leading singular vectors are used); for PEFT's callers.
        svd_driver: of ``torch.linalg.svd``, on CUDA.
        transposed: the base weight is ``[in, out]`` (``fan_in_fan_out``, an embedding): ``dare_*_svd`` draws its masks
            in that order.

    Returns:
        ``lora_A``, ``lora_B`` in the first adapter's dtype, and the scaling, 1. Arithmetic is at least in float32.

    Raises:
        ValueError, TypeError: as in :func:`check_combination` and :func:`combined_rank`; or shapes differ.
    """
    _check_settings(kind, weights, len(factors), density, majority_sign_method, svd_rank, svd_clamp)
    lora_A, lora_B, _ = factors[0]
    for other_A, other_B, _ in factors:
        if other_A.shape[1:] != lora_A.shape[1:] or other_B.shape[::2] != lora_B.shape[::2]:
            raise ValueError(
                f"combine: adapters of different layers: lora_A {list(lora_A.shape)} and lora_B {list(lora_B.shape)}, "
                f"and lora_A {list(other_A.shape)} and lora_B {list(other_B.shape)}"
            )
    rank = combined_rank(kind, [A.shape[0] for A, _, _ in factors], svd_rank)

    if kind == "cat" or kind.endswith("svd"):
        groups = lora_A.shape[0] // lora_B.shape[1]
        if rank % groups:
            raise ValueError(f"combine: svd_rank is {rank}, want a multiple of the convolution's {groups} groups")
        blocks = [(*_blocks(A, B, groups), scaling) for A, B, scaling in factors]
        if kind == "cat" or (kind == "svd" and svd_clamp is None):
            block_A = torch.cat([weight * s * A for weight, (A, _, s) in zip(weights, blocks, strict=True)], dim=1)
            block_B = torch.cat([B for _, B, _ in blocks], dim=2)
            if kind == "svd":
                block_A, block_B = _truncate(block_A, block_B, rank // groups, svd_driver)
        else:
            deltas = [(B @ A * s).mT if transposed else B @ A * s for A, B, s in blocks]
            delta = _add(kind, deltas, weights, density, majority_sign_method)
            delta = delta.mT if transposed else delta
            block_A, block_B = _factorize(delta, rank // groups, svd_clamp, svd_driver)
        new_A = block_A.reshape(rank, *lora_A.shape[1:])
        new_B = block_B.reshape(lora_B.shape[0], rank // groups, *lora_B.shape[2:])
    else:
        scales = [weight * scaling for weight, (_, _, scaling) in zip(weights, factors, strict=True)]
        roots = [math.sqrt(abs(scale)) for scale in scales]
        signed = [math.copysign(root, scale) for root, scale in zip(roots, scales, strict=True)]
        new_A = _add(kind, [A for A, _, _ in factors], signed, density, majority_sign_method)
        new_B = _add(kind, [B for _, B, _ in factors], roots, density, majority_sign_method)
    return new_A.to(lora_A.dtype), new_B.to(lora_B.dtype), 1.0


def _prunes(kind: str) -> bool:
    return kind not in ("linear", "cat", "svd")


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _blocks(lora_A: Tensor, lora_B: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Reshapes factors to one pair of matrices per group of a convolution: ``[groups, r, k]``, ``[groups, o, r]``."""
    return (
        _at_least_float32(lora_A).unflatten(0, (groups, -1)).flatten(2),
        _at_least_float32(lora_B).flatten(1).unflatten(0, (groups, -1)),
    )


def _add(
    kind: str, tensors: list[Tensor], weights: Sequence[float], density: float | None, majority_sign_method: str
) -> Tensor:
    """Prunes ``tensors`` (of one shape) if ``kind`` does, and adds them weighted; for ties averages by sign."""
    if _prunes(kind):
        tensors = [_prune(tensor, density, at_random=kind.startswith("dare")) for tensor in tensors]
    stacked = torch.stack([_at_least_float32(tensor) for tensor in tensors])
    weighted = stacked * stacked.new_tensor(weights).view(-1, *(1,) * tensors[0].dim())
    if "ties" not in kind:
        return weighted.sum(0)
    votes = stacked if majority_sign_method == "total" else stacked.sign()
    agrees = stacked.sign() == torch.where(votes.sum(0) >= 0, 1, -1)
    return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _prune(tensor: Tensor, density: float, *, at_random: bool) -> Tensor:
    if density == 1:
        return tensor
    if at_random:
        return _at_least_float32(tensor) * torch.bernoulli(torch.full_like(tensor, density)) / density
    kept = tensor.abs().flatten().topk(int(density * tensor.numel())).indices
    return tensor * torch.zeros_like(tensor).flatten().index_fill_(0, kept, 1).view(tensor.shape)


def _truncate(lora_A: Tensor, lora_B: Tensor, rank: int, driver: str | None) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``lora_B @ lora_A`` of this rank, without forming the product."""
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.mT)
    core_A, core_B = _factorize(R_B @ R_A.mT, rank, None, driver)
    return core_A @ Q_A.mT, Q_B @ core_B


def _factorize(delta: Tensor, rank: int, clamp: float | None, driver: str | None) -> tuple[Tensor, Tensor]:
    """Factors ``[groups, o, k]`` into ``lora_A [groups, rank, k]`` (orthonormal rows), ``lora_B [groups, o, rank]``."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False, driver=driver)
    lora_A, lora_B = Vh[:, :rank], U[..., :rank] * S[:, None, :rank]
    if clamp is not None:
        limit = torch.cat([lora_B.flatten(), lora_A.flatten()]).quantile(clamp)
        lora_A, lora_B = lora_A.clamp(-limit, limit), lora_B.clamp(-limit, limit)
    missing = rank - S.shape[1]
    if missing > 0:
        lora_A, lora_B = (
            torch.nn.functional.pad(lora_A, (0, 0, 0, missing)),
            torch.nn.functional.pad(lora_B, (0, missing)),
        )
    return lora_A, lora_B


def _check_settings(
    kind: str,
    weights: Sequence[float],
    num_adapters: int,
    density: float | None,
    majority_sign_method: str,
    svd_rank: int | None,
    svd_clamp: float | None,
) -> None:
    if kind not in COMBINATIONS:
        raise ValueError(f"combine: combination_type is {kind!r}, want one of {', '.join(COMBINATIONS)}")
    if len(weights) != num_adapters:
        raise ValueError(
            f"combine: weights has {len(weights)} entries for {num_adapters} adapters; want one per adapter"
        )
    for weight in weights:
        _check_number("weights", weight, -math.inf, math.inf, "finite numbers")
    if density is not None:
        _check_number("density", density, 0, math.nextafter(1, 2), "0 < density <= 1")
    elif _prunes(kind):
        raise ValueError(f"combine: density is None; {kind} needs the fraction of values to keep, 0 < density <= 1")
    if majority_sign_method not in ("total", "frequency"):
        raise ValueError(f'combine: majority_sign_method is {majority_sign_method!r}, want "total" or "frequency"')
    if svd_rank is not None and (not isinstance(svd_rank, int) or isinstance(svd_rank, bool) or svd_rank < 1):
        raise ValueError(f"combine: svd_rank is {svd_rank!r}, want None or an integer of at least 1")
    if svd_clamp is not None:
        _check_number("svd_clamp", svd_clamp, 0, math.nextafter(1, 2), "None or a quantile, 0 < svd_clamp <= 1")


def _check_number(key: str, value: Any, above: float, below: float, want: str) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"combine: {key} has {value!r} of type {type(value).__name__}, want {want}")
    if not above < value < below:
        raise ValueError(f"combine: {key} has {value}, want {want}")
