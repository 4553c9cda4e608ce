"""Combines several adapters of a model into a new one. lora_ext/adapters/combine.py has the arithmetic."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext.adapters.combine import check_combination, combine_factors
from lora_ext.config import LoraConfig, exact_patterns
from lora_ext.injection.inject import apply_injection, check_new_name, check_none_merged
from lora_ext.matching.path_names import EndTable
from lora_ext.model.adapter_set import Adapter, AdapterSet, Part, find_adapter, find_adapters
from lora_ext.model.bare_model import BareModel, check_not_parallel, check_not_sharded, root_module
from lora_ext.nn import LoraAdapter, LoraLayer
from lora_ext.nn.attention import SeparateProjections
from lora_ext.nn.packed_linear import PackedAdapter
from lora_ext.nn.tied import TiedAdapter
from lora_ext.nn.trainable_tokens import TiedRows

ModelT = TypeVar("ModelT", bound=nn.Module)


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
    svd_clamp: float | None = None,
    svd_driver: Literal["gesvd", "gesvdj", "gesvda"] | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> ModelT:
    """Adds a frozen adapter that combines others. As in PEFT, the active adapters stay: :func:`set_adapter` switches.

    Kinds and formulas are PEFT's; :func:`~lora_ext.adapters.combine.combine_factors` explains them. ``"cat"`` is the
    exact weighted sum of the updates, at the sum of the ranks; ``"svd"`` its best approximation of lower rank. Each
    layer combines the adapters that it has. Biases of the adapters (``lora_bias``) add up, weighted. Modules trained in
    full are copied from the one adapter that has them.

    Args:
        model: an injected model.
        adapters, weights: one or more adapter names, and a weight for each; negative ones subtract.
        adapter_name: name of the new adapter.
        combination_type: one of :data:`lora_ext.adapters.combine.COMBINATIONS`.
        svd_rank, svd_clamp, svd_driver, density, majority_sign_method: as in
            :func:`~lora_ext.adapters.combine.combine_factors`.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: the model is not injected, the name is taken, adapters are merged, a setting is wrong, ranks differ
            but factors are added, two adapters train the same module in full, one trains the model's biases, or this
            kind cannot combine a layer's factors; or their ``alora_invocation_tokens`` differ.
        KeyError: there is no such adapter; the message lists them. Nothing is changed.
    """
    caller = "add_weighted_adapter"
    check_not_parallel(caller, model)
    check_not_sharded(caller, model, "call add_weighted_adapter before you shard it")
    held = find_adapters(model, caller)
    held.check_enabled(caller)
    held.check_names(caller, adapters)
    check_new_name(caller, adapter_name, held)
    check_none_merged(caller, root_module(model))
    settings = {
        "density": density,
        "majority_sign_method": majority_sign_method,
        "svd_rank": svd_rank,
        "svd_clamp": svd_clamp,
    }
    kind = check_combination(combination_type, weights, len(adapters), **settings)
    _check_can_combine(caller, held, adapters)
    sources = [find_adapter(model, caller, name) for name in adapters]
    parts: list[Part] = []
    copied: dict = {}  # a shared deepcopy memo: tied adapters stay tied
    layers = _by_layer(sources)
    embeddings = [[part.adapter for part in by_source.values()] for by_source in layers]
    for by_source in sorted(layers, key=_is_tied):  # tied adapters come after their sources
        first = next(iter(by_source.values()))
        if isinstance(first.layer, LoraLayer) and not _is_tied(by_source):
            part = _combined(kind, list(by_source.values()), [weights[i] for i in by_source], settings, svd_driver)
            copied[id(first.adapter)] = part.adapter
            parts.append(part)
            continue
        if isinstance(first.layer, LoraLayer):
            tied_to = [getattr(part.adapter, "source", None) for part in by_source.values()]
            if tied_to not in embeddings:
                raise ValueError(
                    f"{caller}: some of the adapters are tied to the input embedding at {first.path!r} "
                    "(ensure_weight_tying) and others are not; combine adapters of one kind"
                )
        elif len(by_source) > 1:
            names = [adapters[i] for i in by_source]
            raise ValueError(f"{caller}: {first.path!r} is trained in full by {names}; combine only one of them")
        parts.append(dataclasses.replace(first, adapter=copy.deepcopy(first.adapter, copied)))
    config = _config(BareModel(root_module(model)), sources, parts)
    apply_injection(model, Adapter(adapter_name, config, held, tuple(parts)), activate=False)
    return model


def _check_can_combine(caller: str, held: AdapterSet, adapters: Sequence[str]) -> None:
    """Refuses adapters that train something of which there is one in the model, or that act on other tokens."""
    if biased := [name for name in adapters if name in held.biases]:
        raise ValueError(
            f"{caller}: {biased[0]!r} trains the model's own biases, which cannot be combined; leave it out"
        )
    if scaled := [name for name in adapters if held.configs[name].use_dora]:
        raise ValueError(
            f"{caller}: {scaled[0]!r} is a DoRA adapter (use_dora), whose magnitudes cannot be combined; leave it out"
        )
    invocations = {name: held.configs[name].alora_invocation_tokens for name in adapters}
    if len(set(invocations.values())) > 1:
        raise ValueError(
            f"{caller}: the adapters act from different tokens on (alora_invocation_tokens): {invocations}; combine "
            "adapters with the same"
        )
    if len(training := [name for name in adapters if held.configs[name].trainable_token_indices is not None]) > 1:
        raise ValueError(
            f"{caller}: {training} train rows of embeddings (trainable_token_indices); combine only one such adapter"
        )


def _by_layer(sources: Sequence[Adapter]) -> list[dict[int, Part]]:
    """Groups the parts by layer; each group maps the number of a source to its part."""
    layers: dict[int, dict[int, Part]] = {}
    for i, source in enumerate(sources):
        for part in source.parts:
            layers.setdefault(id(part.layer), {})[i] = part
    return list(layers.values())


def _is_tied(parts: Mapping[int, Part]) -> bool:
    return any(isinstance(part.adapter, TiedAdapter | TiedRows) for part in parts.values())


def _combined(
    kind: str, parts: Sequence[Part], weights: Sequence[float], settings: Mapping, svd_driver: str | None
) -> Part:
    path, layer = parts[0].target, parts[0].layer
    if isinstance(parts[0].adapter, SeparateProjections):
        new = copy.deepcopy(parts[0].adapter)
        for name in new:
            projections = [dataclasses.replace(part, adapter=part.adapter[name]) for part in parts]
            new[name] = _combined(kind, projections, weights, settings, svd_driver).adapter
        return dataclasses.replace(parts[0], adapter=new)
    adapters: list[LoraAdapter] = [part.adapter for part in parts]
    if (kind == "cat" or kind.endswith("svd")) and not all(adapter.has_plain_rank for adapter in adapters):
        raise ValueError(
            f"add_weighted_adapter: {kind} cannot combine the factors at {path!r} ({type(layer).__name__}); use a kind "
            "that works element by element"
        )
    enabled = [getattr(adapter, "enable_lora", None) for adapter in adapters]
    if len(set(enabled)) > 1:
        raise ValueError(
            f"add_weighted_adapter: at {path!r}: enable_lora differs: {enabled}; name adapters of the same parts"
        )
    factors = [(adapter.file_A.detach(), adapter.lora_B.detach(), adapter.scaling) for adapter in adapters]
    try:
        file_A, lora_B, scaling = combine_factors(
            kind, factors, weights, **settings, svd_driver=svd_driver, transposed=layer.stores_transposed
        )
    except ValueError as error:
        raise ValueError(f"add_weighted_adapter: at {path!r}: {error}") from error
    new = copy.deepcopy(adapters[0])
    new.set_factors(file_A, lora_B)
    new.r = file_A.shape[0] if new.has_plain_rank or adapters[0].has_plain_rank else adapters[0].r
    new.lora_alpha, new.scaling = new.r, scaling
    biases = [
        weight * adapter.scaling * adapter.lora_bias.detach()
        for weight, adapter in zip(weights, adapters, strict=True)
        if adapter.lora_bias is not None
    ]
    new.lora_bias = nn.Parameter(torch.stack(biases).sum(0)) if biases else None
    return dataclasses.replace(parts[0], adapter=new)


def _config(bare: BareModel, sources: Sequence[Adapter], parts: Sequence[Part]) -> LoraConfig:
    """Builds a config that names exactly these layers, with their ranks and a scaling of 1."""
    first = sources[0].config
    low_rank: dict[str, nn.Module] = {}
    for part in parts:
        if isinstance(part.layer, LoraLayer):
            adapter = low_rank.setdefault(part.target, part.adapter)
            if part.adapter.r != adapter.r:
                raise ValueError(
                    f"add_weighted_adapter: {part.path!r} would have rank {part.adapter.r}, but a layer adapted along "
                    f"with it rank {adapter.r}, and a config has one rank for both; choose a kind that keeps the ranks"
                )
    ranks = [adapter.r for adapter in low_rank.values()]
    rank = max(ranks, key=ranks.count)
    others = exact_patterns({path: adapter.r for path, adapter in low_rank.items()}, rank)
    modules = tuple(path for path in low_rank if path in bare.modules)
    parameters = tuple(path for path in low_rank if path not in bare.modules)
    ends = EndTable(modules)
    named = {path for path in bare.modules if path in ends}
    saved = dict.fromkeys(name for source in sources for name in source.config.modules_to_save or ())
    tokens = [wanted for source in sources if (wanted := source.config.trainable_token_indices) is not None]
    return dataclasses.replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern=others,
        # Names also match the ends of other paths; a regular expression the whole path.
        target_modules=modules if named == set(modules) else "|".join(map(re.escape, modules)),
        target_parameters=parameters or None,
        enable_lora={path: a.enable_lora for path, a in low_rank.items() if isinstance(a, PackedAdapter)} or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=tuple(saved) or None,
        trainable_token_indices=tokens[0] if tokens else None,
        ensure_weight_tying=any(source.config.ensure_weight_tying for source in sources),
        lora_bias=any(adapter.lora_bias is not None for adapter in low_rank.values()),
        bias="none",
        init_lora_weights=True,
        inference_mode=True,
    )
