"""Combines several adapters of a model into a new one, with weights, by three kinds of PEFT's ``add_weighted_adapter``.

None of them forms an ``[out, in]`` update.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext.adapters.life_cycle import check_low_rank
from lora_ext.config import LoraConfig, exact_patterns
from lora_ext.injection.inject import apply_injection
from lora_ext.model.adapter_set import Adapter, Part, check_new_name, check_unmerged, find_adapter, find_adapters
from lora_ext.model.bare_model import BareModel, check_not_parallel, check_not_sharded, root_module
from lora_ext.nn import LoraAdapter

ModelT = TypeVar("ModelT", bound=nn.Module)

COMBINATIONS = ("linear", "cat", "svd")
"""The kinds of combination."""

Factors = tuple[Tensor, Tensor, float]
"""``lora_A``, ``lora_B`` and scaling of one adapter in one layer."""

_CALLER = "add_weighted_adapter"


@checked
@one_at_a_time
def add_weighted_adapter(
    model: ModelT,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
) -> ModelT:
    """Adds a frozen adapter that combines others. As in PEFT, the active adapters stay: :func:`set_adapter` switches.

    With ``delta_i = scaling_i * lora_B_i @ lora_A_i``, as in PEFT:

    - ``linear``: sums ``lora_A`` and ``lora_B`` separately, weighted by ``sqrt(|w_i * scaling_i|)`` (with the sign on
      ``lora_A``). A rough approximation of ``sum w_i * delta_i``, whose rank is higher. One adapter is always combined
      so, which is exact.
    - ``cat``: concatenates the factors: exactly that sum, at the sum of the ranks.
    - ``svd``: the best approximation of that sum of rank ``svd_rank``.

    Each layer combines the adapters that it has. Biases of the adapters (``lora_bias``) add up, weighted.

    Args:
        adapters: one or more adapter names.
        weights: a weight for each; negative ones subtract.
        svd_rank: rank of ``svd``, by default the largest of the adapters'; above the sum's own, zeros are added.

    Raises:
        ValueError: the model is not injected, the name is taken, a setting is wrong, ranks differ but factors are
            added, or an adapter has more than low-rank updates of linear layers, convolutions without groups and
            embeddings.
        KeyError: there is no such adapter.
        RuntimeError: adapters are merged or disabled. Nothing is changed.
    """
    check_not_parallel(_CALLER, model)
    check_not_sharded(_CALLER, model, "combine before you shard it, or in one process, and load the file here")
    held = find_adapters(model, _CALLER)
    held.check_enabled(_CALLER)
    held.check_names(_CALLER, adapters)
    check_new_name(_CALLER, adapter_name, held)
    check_unmerged(_CALLER, model)
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"{_CALLER}: combination_type is {combination_type!r}, want one of {', '.join(COMBINATIONS)}; for the "
            "others use PEFT: peft's add_weighted_adapter"
        )
    if not adapters or len(weights) != len(adapters):
        raise ValueError(f"{_CALLER}: {len(weights)} weights for {len(adapters)} adapters; want one each, at least one")
    if not all(map(math.isfinite, weights)):
        raise ValueError(f"{_CALLER}: weights are {list(weights)}, want finite numbers")
    if svd_rank is not None and svd_rank < 1:
        raise ValueError(f"{_CALLER}: svd_rank is {svd_rank}, want None or an integer of at least 1")
    kind = combination_type if len(adapters) > 1 else "linear"
    sources = [find_adapter(model, _CALLER, name) for name in adapters]
    for source in sources:
        check_low_rank(_CALLER, source)
    parts = _combined_parts(kind, sources, weights, svd_rank)
    config = _config(BareModel(root_module(model)), sources, parts)
    apply_injection(model, Adapter(adapter_name, config, held, tuple(parts)), activate=False)
    return model


@torch.no_grad()
def combine_factors(
    kind: str, factors: Sequence[Factors], weights: Sequence[float], svd_rank: int | None = None
) -> Factors:
    """Combines the adapters of one layer, whose factors are ``[r, in, *kernel]`` and ``[out, r, *ones]``.

    Returns factors in the first adapter's dtype, and the scaling, 1. Arithmetic is at least in float32.

    ValueError: ranks differ, but the kind adds factors.
    """
    first_A, first_B, _ = factors[0]
    ranks = [lora_A.shape[0] for lora_A, _, _ in factors]
    scales = [weight * scaling for weight, (_, _, scaling) in zip(weights, factors, strict=True)]
    dtype = torch.promote_types(first_A.dtype, torch.float32)
    lora_As = [lora_A.to(dtype).flatten(1) for lora_A, _, _ in factors]
    lora_Bs = [lora_B.to(dtype).flatten(1) for _, lora_B, _ in factors]
    if kind == "linear":
        if len(set(ranks)) != 1:
            raise ValueError(
                f"the adapters have ranks {ranks}, but linear adds factors element by element and needs one rank; use "
                "cat or svd"
            )
        roots = [math.sqrt(abs(scale)) for scale in scales]
        new_A = sum(math.copysign(root, s) * A for root, s, A in zip(roots, scales, lora_As, strict=True))
        new_B = sum(root * B for root, B in zip(roots, lora_Bs, strict=True))
    else:
        new_A = torch.cat([scale * lora_A for scale, lora_A in zip(scales, lora_As, strict=True)])
        new_B = torch.cat(lora_Bs, dim=1)
        if kind == "svd":
            new_A, new_B = _truncated(new_A, new_B, svd_rank or max(ranks))
    new_A = new_A.view(-1, *first_A.shape[1:])
    new_B = new_B.view(len(first_B), -1, *first_B.shape[2:])
    return new_A.to(first_A.dtype), new_B.to(first_B.dtype), 1.0


def _truncated(lora_A: Tensor, lora_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``lora_B @ lora_A`` of this rank, without forming the product.

    The new ``lora_A`` has orthonormal rows.
    """
    Q_B, R_B = torch.linalg.qr(lora_B)
    Q_A, R_A = torch.linalg.qr(lora_A.T)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False)
    missing = max(rank - len(S), 0)
    new_A = Vh[:rank] @ Q_A.T
    new_B = Q_B @ (U[:, :rank] * S[:rank])
    return nn.functional.pad(new_A, (0, 0, 0, missing)), nn.functional.pad(new_B, (0, missing))


def _combined_parts(
    kind: str, sources: Sequence[Adapter], weights: Sequence[float], svd_rank: int | None
) -> list[Part]:
    layers: dict[int, dict[int, Part]] = {}  # by layer, the part of each source that has one
    for i, source in enumerate(sources):
        for part in source.parts:
            layers.setdefault(id(part.layer), {})[i] = part
    parts = []
    for held in layers.values():
        first, its_weights = next(iter(held.values())), [weights[i] for i in held]
        try:
            adapter = _combined(kind, [part.adapter for part in held.values()], its_weights, svd_rank)
        except ValueError as error:
            raise ValueError(f"{_CALLER}: at {first.path!r}: {error}") from error
        parts.append(dataclasses.replace(first, adapter=adapter))
    return parts


def _combined(
    kind: str, adapters: Sequence[LoraAdapter], weights: Sequence[float], svd_rank: int | None
) -> LoraAdapter:
    """Combines the adapters of one layer."""
    new = copy.deepcopy(adapters[0])
    factors = [(adapter.file_A.detach(), adapter.lora_B.detach(), adapter.scaling) for adapter in adapters]
    file_A, lora_B, new.scaling = combine_factors(kind, factors, weights, svd_rank)
    new.set_factors(file_A, lora_B)
    new.lora_alpha = new.r = file_A.shape[0]
    biases = [
        weight * adapter.scaling * adapter.lora_bias.detach()
        for weight, adapter in zip(weights, adapters, strict=True)
        if adapter.lora_bias is not None
    ]
    new.lora_bias = nn.Parameter(torch.stack(biases).sum(0)) if biases else None
    return new


def _config(bare: BareModel, sources: Sequence[Adapter], parts: Sequence[Part]) -> LoraConfig:
    """Builds a config that names exactly these layers, with their ranks and a scaling of 1."""
    ranks = {part.target: part.adapter.r for part in parts}
    rank = max(ranks.values(), key=list(ranks.values()).count)
    others = exact_patterns(ranks, rank)
    ends = tuple(f".{path}" for path in ranks)
    is_exact = not any(path.endswith(ends) for path in bare.modules if path not in ranks)
    first = sources[0].config
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        # Names also match the ends of other paths; a regular expression the whole path.
        target_modules=tuple(ranks) if is_exact else "|".join(map(re.escape, ranks)),
        lora_bias=any(part.adapter.lora_bias is not None for part in parts),
        inference_mode=True,
        lora_dropout=first.lora_dropout,
        fan_in_fan_out=first.fan_in_fan_out,
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        metadata=first.metadata,
    )
