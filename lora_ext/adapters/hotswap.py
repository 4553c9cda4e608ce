"""Replaces an adapter's values in a model that is compiled or captured already, for any rank of the new adapter.

Compiled code depends on the parameters' addresses and shapes and on the scaling, so none of them changes. Beforehand,
the adapter is padded to the largest rank to come; an adapter of a smaller rank fills a part, and the rest is zero. A
different scaling is multiplied into ``lora_B``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.printable import first_shape, listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.adapters.life_cycle import check_unmerged
from lora_ext.config import LoraConfig, exact_patterns
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.expert_layout import check_expert_layout
from lora_ext.files.misfits import misfits
from lora_ext.files.save_load import read_adapter, warn_of_a_copy
from lora_ext.model.adapter_set import UNSCALED, Adapter, Part, find_adapter
from lora_ext.model.bare_model import check_not_parallel, check_not_sharded
from lora_ext.nn import DoraAdapter, LoraAdapter

ModelT = TypeVar("ModelT", bound=nn.Module)

_RANK_DIMS = {".lora_A.weight": 0, ".lora_embedding_A": 0, ".lora_B.weight": 1, ".lora_embedding_B": 1}


@checked
@one_at_a_time
def prepare_hotswap(model: ModelT, r: int, adapter_name: str | None = None) -> ModelT:
    """Pads an adapter to rank ``r`` with zeros, so that adapters up to that rank can be swapped in.

    Call it before ``torch.compile``, graph capture and the creation of an optimizer: it makes new parameters. The
    model's output does not change, and training keeps the zeros. A saved file has rank ``r``.

    Args:
        model: an injected model.
        r: the largest rank to come.
        adapter_name: the adapter to pad; None: the active one.

    Raises:
        ValueError: the model is not injected, a layer's rank is above ``r``, or its factors cannot be padded (grouped
            convolutions, packed projections, experts).
        KeyError: there is no such adapter.
        RuntimeError: it is merged. Nothing is changed.
    """
    check_not_parallel("prepare_hotswap", model)
    check_not_sharded("prepare_hotswap", model, "call prepare_hotswap before you shard it")
    adapter = find_adapter(model, "prepare_hotswap", adapter_name)
    check_unmerged("prepare_hotswap", model, adapter.name)
    if r < 1:
        raise ValueError(f"prepare_hotswap: r is {r}, want an integer of at least 1")
    low_rank = [(part, update) for part in adapter.parts for update in _updates_of(part.adapter)]
    for part, update in low_rank:
        if update.r > r:
            raise ValueError(
                f"prepare_hotswap: r is {r}, but {part.path!r} has rank {update.r}; choose at least {update.r}"
            )
        if not update.has_plain_rank:
            raise ValueError(
                f"prepare_hotswap: the factors at {part.path!r} cannot be padded: {type(part.layer).__name__}; use "
                "load_adapter and set_adapter for this model"
            )
    alphas = {part.target: update.scaling * r for part, update in low_rank}
    alpha = max(alphas.values(), key=list(alphas.values()).count, default=adapter.config.lora_alpha)
    patterns = {"rank_pattern": {}, "alpha_pattern": exact_patterns(alphas, alpha)}
    config = dataclasses.replace(adapter.config, r=r, lora_alpha=alpha, use_rslora=False, **patterns)
    padded = [(_padded(update.file_A.detach(), 0, r), _padded(update.lora_B.detach(), 1, r)) for _, update in low_rank]
    adapter.into.configs[adapter.name] = config
    for (part, update), factors in zip(low_rank, padded, strict=True):
        update.set_factors(*factors, update.lora_A.requires_grad)
        update.r, update.lora_alpha = r, alphas[part.target]
    return model


@checked
@one_at_a_time
def hotswap_adapter(model: ModelT, directory: str | os.PathLike[str], adapter_name: str | None = None) -> ModelT:
    """Replaces the values of an adapter of ``model`` by those of the adapter in ``directory``.

    Parameter objects, shapes and scalings stay: compiled code and captured graphs keep working, without recompilation.
    Layers that the file does not adapt get an update of zero. For ranks above the present one, call
    :func:`prepare_hotswap` first.

    Args:
        model: an injected model, compiled or not.
        directory: an adapter written by :func:`lora_ext.save_adapter` or PEFT.
        adapter_name: the adapter whose values to replace; None: the active one.

    Raises:
        FileNotFoundError, ValueError: as in :func:`lora_ext.load_adapter`; or the file adapts other layers, or a layer
            with a rank above the present one, or holds other values of a base layer; all of them are listed.
        KeyError: there is no such adapter.
        RuntimeError: it is merged. The model is then unchanged.
    """
    check_not_sharded("hotswap_adapter", model, "load_adapter replaces an adapter's values")
    file = read_adapter(directory, "hotswap_adapter")
    config = file.lora_config("hotswap_adapter")
    adapter = find_adapter(model, "hotswap_adapter", adapter_name)
    check_unmerged("hotswap_adapter", model, adapter.name)
    warn_of_a_copy("hotswap_adapter", adapter)
    check_expert_layout(adapter, file, "hotswap_adapter")
    targets = _in_file(adapter.tensors())
    values = {key: tensor for key, tensor in file.tensors.items() if key in targets}
    for part in adapter.parts:
        values |= _values_of(part, config, file)
    problems = [f"missing key: {key}" for key in targets if key not in values] + misfits(targets, values)
    if problems := _other_options(adapter, config, file) + problems + _other_keys(adapter, file, targets.keys()):
        raise ValueError(
            f"hotswap_adapter: {file.path} does not fit the adapter {adapter.name!r} (for a larger rank call "
            f"prepare_hotswap first):{listed(first_shape(problems))}"
        )
    file.warn_of_damage(key for key in values if key in file.tensors)
    with torch.no_grad():
        for key, tensor in values.items():
            targets[key].copy_(tensor)
    return model


def _values_of(part: Part, config: LoraConfig, file: AdapterFile) -> dict[str, Tensor]:
    """The new values of a layer's low-rank updates, by key: padded and scaled; zeros, if the file has none of them."""
    updates = _updates_of(part.adapter)
    if not updates:
        return {}
    tensors = _in_file(part.layer.file_tensors(part.file_path, part.adapter))
    # A DoRA adapter that changes nothing has the norms of the weight's rows: no file with zeros stands for it.
    if not any(key in file.tensors for key in tensors) and not isinstance(part.adapter, DoraAdapter):
        return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    is_plain = all(update.has_plain_rank for update in updates)
    values = {}
    for key, tensor in tensors.items():
        if key not in file.tensors:
            continue
        new = file.tensors[key]
        dim = next((dim for suffix, dim in _RANK_DIMS.items() if key.endswith(suffix)), None)
        if is_plain and dim is not None and _differ_only_in(dim, new, tensor):
            new = _padded(new, dim, tensor.shape[dim])
        factor = config.scaling_for(part.target) / updates[0].scaling / part.file_scale_of(key)
        if new.is_floating_point() and not key.endswith(UNSCALED) and factor != 1.0:
            new = new.to(tensor.dtype) * factor
        values[key] = new
    return values


def _other_options(adapter: Adapter, config: LoraConfig, file: AdapterFile) -> list[str]:
    """Returns in which options that shapes do not show the file differs from the model."""
    problems = [
        f"{option}: {shown(getattr(config, option))} in the file, {shown(getattr(adapter.config, option))} in the model"
        for option in ("trainable_token_indices", "use_dora")
        if getattr(config, option) != getattr(adapter.config, option)
    ]
    for part in adapter.parts:
        theirs, ours = config.enable_lora_for(part.target), getattr(part.adapter, "enable_lora", None)
        if theirs != ours and _updates_of(part.adapter) and any(key in file.tensors for key in _keys([part])):
            problems.append(f"enable_lora of {part.target}: {shown(theirs)} in the file, {ours} in the model")
    return problems


def _other_keys(adapter: Adapter, file: AdapterFile, known: Collection[str]) -> list[str]:
    """Returns what else ``file`` has that the model lacks. PEFT also saves the base layer of an adapted embedding."""
    problems, base = [], _in_file(adapter.base_tensors())
    for key in file.tensors:
        if key not in known and key not in base:
            problems.append(f"unexpected key: {key}")
        elif key not in known and _differ(file.tensors[key], base[key]):
            problems.append(f"base layer {key}: not the model's, and load_adapter loads it")
    return problems


def _in_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{KEY_PREFIX}{key}": tensor for key, tensor in tensors.items()}


def _differ(values: Tensor, tensor: Tensor) -> bool:
    return values.shape != tensor.shape or not torch.equal(values.to(tensor), tensor)


def _keys(parts: Iterable[Part]) -> set[str]:
    return {key for part in parts for key in _in_file(part.layer.file_tensors(part.file_path, part.adapter))}


def _updates_of(adapter: nn.Module) -> list[LoraAdapter]:
    """The low-rank updates in the adapter of one layer; empty for a module trained in full."""
    return [adapter] if isinstance(adapter, LoraAdapter) else []


def _differ_only_in(dim: int, smaller: Tensor, larger: Tensor) -> bool:
    sizes, want = list(smaller.shape), list(larger.shape)
    return len(sizes) == len(want) and sizes[dim] < want[dim] and [*sizes[:dim], want[dim], *sizes[dim + 1 :]] == want


def _padded(factor: Tensor, dim: int, size: int) -> Tensor:
    """A copy of ``factor`` with zeros up to ``size`` along ``dim``."""
    after = factor.dim() - 1 - dim
    return nn.functional.pad(factor, (*[0, 0] * after, 0, size - factor.shape[dim]))
