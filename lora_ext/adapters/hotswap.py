"""Replaces an adapter's values in a model that is compiled or captured already, for any rank of the new adapter.

Compiled code depends on the parameters' addresses and shapes and on the scaling, so none of them changes. Beforehand,
the adapter is padded to the largest rank to come; an adapter of a smaller rank fills a part, and the rest is zero. A
different scaling is multiplied into ``lora_B``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
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
from lora_ext.files.expert_layout import in_present_layout
from lora_ext.files.save_load import read_adapter, warn_of_a_copy
from lora_ext.model.adapter_set import Adapter, Part, find_adapter
from lora_ext.model.bare_model import check_not_parallel, check_not_sharded
from lora_ext.nn import DoraAdapter, LoraAdapter
from lora_ext.nn.attention import SeparateProjections
from lora_ext.nn.tied import TiedAdapter

ModelT = TypeVar("ModelT", bound=nn.Module)


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

    Returns:
        ``model``, the same object.

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
    low_rank = [
        dataclasses.replace(part, adapter=update) for part in adapter.parts for update in _updates_of(part.adapter)
    ]
    padded = [_padded(part, r) for part in low_rank]
    alphas = {part.target: part.adapter.scaling * r for part in low_rank}
    alpha = max(alphas.values(), key=list(alphas.values()).count, default=adapter.config.lora_alpha)
    adapter.into.configs[adapter.name] = dataclasses.replace(
        adapter.config,
        r=r,
        lora_alpha=alpha,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern=exact_patterns(alphas, alpha),
    )
    for part, (file_A, lora_B) in zip(low_rank, padded, strict=True):
        part.adapter.set_factors(file_A, lora_B, part.adapter.lora_A.requires_grad)
        part.adapter.r, part.adapter.lora_alpha = r, alphas[part.target]
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

    Returns:
        ``model``, the same object.

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
    file = in_present_layout(adapter, file, "hotswap_adapter")
    values = [value for part in adapter.parts for value in _values_of_part(part, config, file)]
    if adapter.biases is not None:
        values += [_Value(f"{KEY_PREFIX}{key}", tensor) for key, tensor in adapter.biases.file_tensors().items()]
    if problems := _misfits(adapter, config, file, values):
        raise ValueError(
            f"hotswap_adapter: {file.path} does not fit the adapter {adapter.name!r} (for a larger rank call "
            f"prepare_hotswap first):{listed(first_shape(problems))}"
        )
    file.warn_of_damage(value.key for value in values if value.is_in_file)
    with torch.no_grad():
        for value in values:
            value.write(file.tensors[value.key] if value.is_in_file else None)
    return model


@dataclasses.dataclass(frozen=True)
class _Value:
    """The new value of a model's tensor: that of ``key`` in the file, times ``factor``, or zero.

    Attributes:
        is_in_file: False: zero.
        rank_dim: the dimension of the rank, in which the file's tensor may be shorter: zeros follow. None: it has none.
    """

    key: str
    tensor: Tensor
    is_in_file: bool = True
    rank_dim: int | None = None
    factor: float = 1.0

    def write(self, values: Tensor | None) -> None:
        """Writes it. ``values`` is the file's tensor."""
        target = self.tensor
        if values is None:
            target.zero_()
            return
        if self.rank_dim is not None:
            dim, rank = self.rank_dim, values.shape[self.rank_dim]
            target.narrow(dim, rank, target.shape[dim] - rank).zero_()
            target = target.narrow(dim, 0, rank)
            values = values.to(target.dtype)
        target.copy_(values * self.factor if self.factor != 1.0 else values)

    def misfit(self, file: AdapterFile) -> str | None:
        """Returns why the file's tensor does not fit, or None."""
        key, want = self.key, list(self.tensor.shape)
        if not self.is_in_file:
            return None
        if key not in file:
            return f"missing key: {key}"
        shape, dtype = list(file.shape(key)), file.dtype(key)
        fits = len(shape) == len(want) and all(
            have <= size if dim == self.rank_dim else have == size
            for dim, (have, size) in enumerate(zip(shape, want, strict=True))
        )
        if not fits:
            return f"shape of {key}: {shown(shape)} in the file, {want} in the model"
        if dtype.is_floating_point != self.tensor.is_floating_point() or dtype.is_complex:
            return f"dtype of {key}: {dtype} in the file, {self.tensor.dtype} in the model"
        return None


def _values_of_part(part: Part, config: LoraConfig, file: AdapterFile) -> list[_Value]:
    """The new values of one layer's adapter; of a low-rank update that the file lacks, zeros."""
    if isinstance(part.adapter, TiedAdapter):  # shares another part's values
        return []
    tensors = _file_tensors(part)
    updates = _updates_of(part.adapter)
    if not updates:
        return [_Value(key, tensor) for key, tensor in tensors.items()]
    # A DoRA adapter that changes nothing has the norms of the weight's rows: no file with zeros stands for it.
    if not any(key in file for key in tensors) and not isinstance(part.adapter, DoraAdapter):
        return [_Value(key, tensor, is_in_file=False) for key, tensor in tensors.items()]
    values = []
    for key, tensor in tensors.items():
        update = next(u for u in updates if any(_holds(tensor, parameter) for parameter in u.parameters()))
        is_A, is_B = _holds(tensor, update.lora_A), _holds(tensor, update.lora_B)
        rank_dim = None
        if update.has_plain_rank and (is_A or is_B):
            rank_dim = 0 if is_A else 1
        factor = 1.0
        if not is_A and not key.endswith(".lora_magnitude_vector"):
            factor = config.scaling_for(part.target) / update.scaling / part.file_scale_of(key)
        values.append(_Value(key, tensor, True, rank_dim, factor))
    return values


def _misfits(adapter: Adapter, config: LoraConfig, file: AdapterFile, values: Sequence[_Value]) -> list[str]:
    """Returns why the values of ``file`` cannot replace those of ``adapter``; empty if they can."""
    problems = [
        f"{option}: {shown(getattr(config, option))} in the file, {shown(getattr(adapter.config, option))} in the model"
        for option in ("trainable_token_indices", "use_dora")
        if getattr(config, option) != getattr(adapter.config, option)
    ]
    expected = {value.key for value in values}
    for part in adapter.parts:
        tensors = _file_tensors(part)
        expected |= tensors.keys()
        theirs, ours = config.enable_lora_for(part.target), getattr(part.adapter, "enable_lora", None)
        if theirs != ours and _updates_of(part.adapter) and any(key in file for key in tensors):
            problems.append(f"enable_lora of {part.target}: {shown(theirs)} in the file, {ours} in the model")
    problems += [problem for value in values if (problem := value.misfit(file)) is not None]
    # PEFT saves the base layer of an adapted embedding or head, too.
    base = {f"{KEY_PREFIX}{key}": tensor for key, tensor in adapter.base_tensors().items()}
    problems += [f"unexpected key: {key}" for key in file.keys() if key not in expected | base.keys()]  # noqa: SIM118
    problems += [
        f"base layer {key}: not the model's, and load_adapter loads it"
        for key, tensor in base.items()
        if key in file and key not in expected and not _equals(file, key, tensor)
    ]
    return problems


def _file_tensors(part: Part) -> dict[str, Tensor]:
    """The tensors of one layer's adapter, by their keys in a file."""
    return {f"{KEY_PREFIX}{key}": t for key, t in part.layer.file_tensors(part.file_path, part.adapter).items()}


def _equals(file: AdapterFile, key: str, tensor: Tensor) -> bool:
    """Returns whether the file has the values of ``tensor``, in its dtype."""
    return file.shape(key) == tuple(tensor.shape) and torch.equal(file.tensor(key).to(tensor), tensor)


def _updates_of(adapter: nn.Module) -> list[LoraAdapter]:
    """The low-rank updates in the adapter of one layer; empty for a module trained in full."""
    if isinstance(adapter, SeparateProjections):
        return list(adapter.values())
    return [adapter] if isinstance(adapter, LoraAdapter) else []


def _holds(tensor: Tensor, parameter: Tensor) -> bool:
    """Returns whether ``tensor`` is the parameter, or its transpose (an embedding's)."""
    return tensor is parameter or tensor._base is parameter


def _padded(part: Part, r: int) -> tuple[Tensor, Tensor]:
    """The factors with zeros for further ranks, in the form of files."""
    adapter = part.adapter
    if adapter.r > r:
        raise ValueError(
            f"prepare_hotswap: r is {r}, but {part.path!r} has rank {adapter.r}; choose at least {adapter.r}"
        )
    if not adapter.has_plain_rank:
        raise ValueError(
            f"prepare_hotswap: the factors at {part.path!r} cannot be padded: {type(part.layer).__name__}; use "
            "load_adapter and set_adapter for this model"
        )
    return _with_zeros(adapter.file_A, 0, r), _with_zeros(adapter.lora_B, 1, r)


def _with_zeros(factor: Tensor, dim: int, size: int) -> Tensor:
    """A copy of ``factor`` with zeros up to ``size`` along ``dim``."""
    shape = list(factor.shape)
    shape[dim] = size
    larger = factor.detach().new_zeros(shape)
    larger.narrow(dim, 0, factor.shape[dim]).copy_(factor.detach())
    return larger
