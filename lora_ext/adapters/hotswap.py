"""Replaces an adapter's values in a model that is compiled or captured already, for any rank of the new adapter.

Compiled code depends on the parameters' addresses and shapes and on the scaling, so none of them changes. Beforehand,
the adapter is padded to the largest rank to come; an adapter of a smaller rank fills a part, and the rest is zero. A
different scaling is multiplied into ``lora_B``.
"""

from __future__ import annotations

import dataclasses
import os
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import listed
from lora_ext.adapters.life_cycle import check_low_rank
from lora_ext.config import LoraConfig, exact_patterns
from lora_ext.files.adapter_file import AdapterFile, misfits
from lora_ext.model.adapter_set import UNSCALED, Part, check_unmerged, find_adapter
from lora_ext.model.bare_model import check_not_parallel, check_not_sharded, root_module

ModelT = TypeVar("ModelT", bound=nn.Module)

_RANK_DIMS = {".lora_A.weight": 0, ".lora_embedding_A": 0, ".lora_B.weight": 1, ".lora_embedding_B": 1}


@checked
@one_at_a_time
def prepare_hotswap(model: ModelT, r: int, adapter_name: str | None = None) -> ModelT:
    """Pads an adapter to rank ``r`` with zeros, so that adapters up to that rank can be swapped in.

    Call it before ``torch.compile``, graph capture and the creation of an optimizer: it makes new parameters. The
    model's output does not change, and training keeps the zeros. A saved file has rank ``r``. None: the active adapter.

    Raises:
        ValueError: the model is not injected, a layer's rank is above ``r``, or the adapter has more than low-rank
            updates of linear layers, convolutions without groups and embeddings.
        KeyError: there is no such adapter. RuntimeError: it is merged. Nothing is changed.
    """
    check_not_parallel("prepare_hotswap", model)
    check_not_sharded("prepare_hotswap", model, "call prepare_hotswap before you shard it")
    adapter = find_adapter(model, "prepare_hotswap", adapter_name)
    check_unmerged("prepare_hotswap", model, adapter.name)
    check_low_rank("prepare_hotswap", adapter)
    largest = max(adapter.parts, key=lambda part: part.adapter.r)
    if r < (least := largest.adapter.r):
        raise ValueError(f"prepare_hotswap: r is {r}, but {largest.path!r} has rank {least}; choose at least {least}")
    alphas = {part.target: part.adapter.scaling * r for part in adapter.parts}
    alpha = max(alphas.values(), key=list(alphas.values()).count)
    patterns = {"rank_pattern": {}, "alpha_pattern": exact_patterns(alphas, alpha)}
    config = dataclasses.replace(adapter.config, r=r, lora_alpha=alpha, use_rslora=False, **patterns)
    adapter.into.configs[adapter.name] = config
    for part in adapter.parts:
        update = part.adapter
        factors = _padded(update.file_A.detach(), 0, r), _padded(update.lora_B.detach(), 1, r)
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

    Raises:
        FileNotFoundError, ValueError: as in :func:`lora_ext.load_adapter`; or the adapter is none that
            :func:`prepare_hotswap` takes; or the file adapts other layers, or a layer with a rank above the present
            one, or holds other values of a base layer; all of them are listed.
        KeyError: there is no such adapter. RuntimeError: it is merged. The model is then unchanged.
    """
    check_not_sharded("hotswap_adapter", model, "load_adapter replaces an adapter's values")
    file = AdapterFile.open(directory, caller="hotswap_adapter")
    config = file.lora_config("hotswap_adapter")
    adapter = find_adapter(model, "hotswap_adapter", adapter_name)
    check_unmerged("hotswap_adapter", model, adapter.name)
    check_low_rank("hotswap_adapter", adapter)
    targets = adapter.tensors()
    values = {key: tensor for part in adapter.parts for key, tensor in _values_of(part, config, file).items()}
    if problems := misfits(targets, values) + _other_keys(adapter.base_tensors(root_module(model)), file, targets):
        raise ValueError(
            f"hotswap_adapter: {file.path} does not fit the adapter {adapter.name!r} (for a larger rank call "
            f"prepare_hotswap first):{listed(problems)}"
        )
    with torch.no_grad():
        for key, tensor in values.items():
            targets[key].copy_(tensor)
    return model


def _values_of(part: Part, config: LoraConfig, file: AdapterFile) -> dict[str, Tensor]:
    """Returns a layer's new values, by key: padded and scaled; zeros, if the file has none of them."""
    tensors = part.layer.file_tensors(part.file_path, part.adapter)
    if not any(key in file.tensors for key in tensors):
        return {key: torch.zeros_like(tensor) for key, tensor in tensors.items()}
    rank, factor = config.rank_for(part.target), config.scaling_for(part.target) / part.adapter.scaling
    values = {}
    for key, tensor in tensors.items():
        if key not in file.tensors:
            continue
        new = file.tensors[key]
        dim = next((dim for suffix, dim in _RANK_DIMS.items() if key.endswith(suffix)), None)
        if dim is not None and [*new.shape] == [*tensor.shape[:dim], rank, *tensor.shape[dim + 1 :]]:
            new = _padded(new, dim, tensor.shape[dim])
        values[key] = new if key.endswith(UNSCALED) or factor == 1.0 else new.to(tensor.dtype) * factor
    return values


def _other_keys(base: dict[str, Tensor], file: AdapterFile, targets: dict[str, Tensor]) -> list[str]:
    """Returns what else ``file`` has. PEFT also saves the base layer of an adapted embedding."""
    problems = []
    for key in file.tensors.keys() - targets.keys():
        if key not in base:
            problems.append(f"unexpected key: {key}")
        elif file.tensors[key].shape != base[key].shape or not torch.equal(file.tensors[key].to(base[key]), base[key]):
            problems.append(f"base layer {key}: not the model's, and load_adapter loads it")
    return sorted(problems)


def _padded(factor: Tensor, dim: int, size: int) -> Tensor:
    """Pads ``factor`` with zeros up to ``size`` along ``dim``; one that is larger stays."""
    after = factor.dim() - 1 - dim
    return nn.functional.pad(factor, (*[0, 0] * after, 0, max(size - factor.shape[dim], 0)))
