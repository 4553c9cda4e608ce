"""PEFT's merge and unmerge with lora_ext's exact records: unmerge() restores every bit of the weight.

That holds for quantised weights too: the sum is quantised once, from float32, and unmerging copies the old bytes back.

PEFT's bookkeeping (``merged_adapters``) does not change. A layer also holds a record of every adapter merged here, and
unmerges in reverse order. If a checksum shows that the weight was replaced or changed, PEFT subtracts the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from lora_ext import _load
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import warn_user
from lora_ext._common.sharded import is_elsewhere
from lora_ext._ops.checks import FLOATING
from lora_ext._ops.dora import row_norms, scale_of_rows
from lora_ext.integrations.peft.eligibility import DORA, variant_of
from lora_ext.merging.quantized import QuantizedRecord, merge_quantized_
from lora_ext.merging.rounding import Draws, LayerSeed, check_rounds_stochastically, draws_for
from lora_ext.merging.weights import MergeRecord, merge_all_, pack_factors, unmerge_all_
from lora_ext.nn.base_layer import is_conv1d
from lora_ext.quantized import QuantizedWeight, quantized_weight
from lora_ext.quantized.rescaled import RescaledWeight

_SEED = "_lora_ext_seed"  # key in the layer's __dict__ of the seed of stochastic merges
_MERGES = "_lora_ext_merges"  # key in the layer's __dict__ while merged, so that copies and pickles have it


class ExactMerge(NamedTuple):
    """An adapter merged into a weight, and into a bias with lora_bias: how to restore both, and their checksums."""

    records: list[MergeRecord | QuantizedRecord]
    checksums: list[int]


class ExactMerging:
    """Overrides ``merge`` and ``unmerge`` of a LoRA layer."""

    @one_at_a_time
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if is_elsewhere(self.get_base_layer()._parameters.get("weight")):
            raise RuntimeError(  # PEFT would add an empty update to an empty weight, and call it merged
                f"{type(self).__name__}.merge: DeepSpeed's ZeRO-3 has partitioned the weight; save the adapter, and "
                "merge in one process, or on disk (lora-ext merge)"
            )
        for name in check_adapters_to_merge(self, adapter_names) or ():
            if (name in self.lora_A or name in self.lora_embedding_A) and not _merge_exactly(self, name):
                super().merge(safe_merge=safe_merge, adapter_names=[name])

    @one_at_a_time
    def unmerge(self) -> None:
        if _MERGES not in self.__dict__:
            super().unmerge()
            return
        while self.merged_adapters:
            if not _unmerge_exactly(self, self.merged_adapters[-1]):
                *others, name = self.merged_adapters
                self.merged_adapters = [name]
                try:
                    super().unmerge()
                finally:
                    self.merged_adapters = others
        del self.__dict__[_MERGES]


def why_not_merge(layer: LoraLayer, name: str) -> str:
    """Returns why PEFT's code merges adapter ``name``, or ""."""
    base = layer.get_base_layer()
    weight = base._parameters.get("weight")
    variant = variant_of(layer, name)
    if variant == DORA:
        if layer.merged_adapters and name not in layer.merged_adapters:
            return f"now: adapter {name!r} is DoRA, and {layer.merged_adapters} are merged"
        if getattr(layer, "fan_in_fan_out", False) != is_conv1d(base):
            return f"adapter {name!r} is DoRA, and fan_in_fan_out does not fit the base layer"
    elif variant:
        return f"adapter {name!r} is a variant of LoRA ({variant})"
    if (quantized := quantized_weight(base)) is not None:
        reason = quantized.why_not_quantize()
        return reason and f"the base layer's weight cannot be quantised again: {reason}"
    if type(weight) is not nn.Parameter:
        return f"the base layer's weight is a {type(weight).__name__}, not a plain parameter"
    if is_elsewhere(weight):
        return "DeepSpeed's ZeRO-3 has partitioned the base layer's weight"
    if weight.dtype not in FLOATING or not weight.is_contiguous():
        return f"the base layer's weight is {weight.dtype} with strides {tuple(weight.stride())}"
    if not (weight.is_cpu or (weight.is_cuda and not _load.cuda_unavailable_reason)):
        return f"the base layer's weight is on {weight.device}"
    A, B = _factors(layer, name)
    if A.device != weight.device or (B.shape[0], A.shape[1]) != _matrix(weight).shape:
        return f"adapter {name!r} is not whole on the device of the base layer's weight (offloaded, sharded, grouped)"
    return ""


def set_rounding(
    layers: Mapping[str, LoraLayer], seed: int | None, accelerated_class: Callable[[type], type | None]
) -> None:
    """Sets how merges of the layers round from now on. ValueError, TypeError: a layer cannot round stochastically.

    ``layers``: by path, of PEFT's classes or accelerated. ``accelerated_class``: of PEFT's class, the one that merges
    exactly.
    """
    for path, layer in layers.items() if seed is not None else ():
        kind = type(layer) if isinstance(layer, ExactMerging) else accelerated_class(type(layer))
        base = layer.get_base_layer()
        is_exact = kind is not None and issubclass(kind, ExactMerging)
        why = "" if is_exact else f"PEFT merges a {type(layer).__name__}"
        if why := why or ("its weight is quantised" if quantized_weight(base) is not None else ""):
            raise ValueError(f"accelerate: {path!r} cannot be merged with merge_rounding='stochastic': {why}")
        check_rounds_stochastically("accelerate", base.weight.dtype, f"the weight of {path!r}")
    for path, layer in layers.items():
        layer.__dict__.pop(_SEED, None)
        if seed is not None:
            layer.__dict__[_SEED] = LayerSeed(seed, path.removeprefix("base_model.model."))


def has_exact_merges(layer: nn.Module) -> bool:
    """Returns whether the layer has exact merges, which only its unmerge() restores bit by bit."""
    return _MERGES in layer.__dict__


def _factors(layer: LoraLayer, name: str) -> tuple[Tensor, Tensor]:
    """Returns ``A [r, columns]`` and ``B [rows, r]``: ``B @ A`` is the adapter's update of the weight as stored."""
    if name in layer.lora_embedding_A:
        return layer.lora_embedding_B[name].T, layer.lora_embedding_A[name].T
    A, B = layer.lora_A[name].weight.flatten(1), layer.lora_B[name].weight.flatten(1)
    return (B.T, A.T) if getattr(layer, "fan_in_fan_out", False) else (A, B)


def _matrix(weight: Tensor) -> Tensor:
    """Returns a view of the stored weight as ``[rows, columns]``; a bias is one row."""
    return weight.flatten(1) if weight.dim() > 1 else weight.unsqueeze(0)


@torch.no_grad()
def _merge_exactly(layer: LoraLayer, name: str) -> bool:
    """Merges exactly; returns False, with nothing changed, if PEFT's code must merge (non-finite results, ...)."""
    seed = layer.__dict__.get(_SEED)
    if why := why_not_merge(layer, name) or ("of DoRA" if seed and variant_of(layer, name) == DORA else ""):
        if seed is not None:
            raise ValueError(f"merge: the weight of {seed.path!r} cannot be rounded stochastically: {why}")
        return False
    base, scaling, norms = layer.get_base_layer(), float(layer.scaling[name]), None
    quantized = quantized_weight(base)
    weights: list[Tensor | QuantizedWeight] = [_matrix(base.weight) if quantized is None else quantized]
    updates = [(*_factors(layer, name), scaling)]
    lora_bias = layer.lora_B[name].bias if name in layer.lora_B else None
    if variant_of(layer, name) == DORA:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
        norms = row_norms(RescaledWeight(base, quantized).dequantize(), A, B, scaling)
        factor = scale_of_rows(layer.lora_magnitude_vector[name].weight, norms)
        weights, updates = [RescaledWeight(base, quantized, factor)], [(A, factor.unsqueeze(1) * B, scaling)]
    elif lora_bias is not None:
        if base.bias is None:  # in PEFT's words
            raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")
        weights.append(_matrix(base.bias))
        updates.append((lora_bias.unsqueeze(0), lora_bias.new_ones(1, 1), scaling))
    keys = [key if not layer.merged_adapters else f"{key}/{name}" for key in ("weight", "bias")[: len(weights)]]
    draws = None if seed is None else [draws_for(seed, key) for key in keys]
    try:
        records = _merge_all(weights, updates, draws)
    except ValueError:
        if seed is not None:
            raise
        return False
    if norms is not None:
        layer._cache_store(f"{name}-weight_norm", norms)  # for PEFT's unmerge, should the weight change meanwhile
    layer.__dict__.setdefault(_MERGES, {})[name] = ExactMerge(records, [_checksum(weight) for weight in weights])
    layer.merged_adapters.append(name)
    return True


def _merge_all(
    weights: list[Tensor | QuantizedWeight],
    updates: list[tuple[Tensor, Tensor, float]],
    draws: list[Draws] | None = None,
) -> list[MergeRecord | QuantizedRecord]:
    """Merges into all of the weights, or into none; only the first may be quantised."""
    first, *others = weights
    dtypes = [weight.sum_dtype if isinstance(weight, QuantizedWeight) else weight.dtype for weight in weights]
    packed = [pack_factors(dtype, [update]) for dtype, update in zip(dtypes, updates, strict=True)]
    lora_As, lora_Bs = [A for A, _ in packed], [B for _, B in packed]
    if not isinstance(first, QuantizedWeight):
        return merge_all_("merge", weights, lora_As, lora_Bs, draws=draws)
    made = merge_quantized_("merge", [first], lora_As[:1], lora_Bs[:1], ["the weight"])
    try:
        return [*made, *merge_all_("merge", others, lora_As[1:], lora_Bs[1:])]
    except BaseException:
        first.write(made[0].stored)
        raise


@torch.no_grad()
def _unmerge_exactly(layer: LoraLayer, name: str) -> bool:
    merges: dict[str, ExactMerge] = layer.__dict__[_MERGES]
    if name not in merges:
        return False
    merge, base = merges[name], layer.get_base_layer()
    records = list(merge.records)
    parameters = [base._parameters.get(which) for which in ("weight", "bias")[: len(records)]]
    old = records.pop(0) if isinstance(records[0], QuantizedRecord) else None
    if old is not None:
        holder = RescaledWeight(base, quantized_weight(base)) if parameters.pop(0) is not None else None
    if all(parameter is not None and parameter.is_contiguous() for parameter in parameters):
        weights = [_matrix(parameter) for parameter in parameters]
        checked = weights if old is None else [holder, *weights]
        if [_checksum(weight) for weight in checked] == merge.checksums:
            unmerge_all_("unmerge", weights, records)
            if old is not None:
                holder.write(old.stored)
            layer.merged_adapters.pop()
            del merges[name]
            return True
    del merges[name]
    warn_user(
        f"The base weight into which adapter {name!r} was merged has been replaced or changed since: PEFT subtracts "
        "the update from the current weight, which rounds.",
    )
    return False


def _checksum(weight: Tensor | QuantizedWeight | None) -> int:
    """Sums a contiguous tensor's bits, as 64-bit integers where possible, at the speed of memory."""
    if weight is None:  # quantised when it was merged, and no longer
        return 0
    if isinstance(weight, QuantizedWeight):
        return sum(_checksum(tensor.contiguous()) for tensor in weight.stored().values())
    item = weight.element_size()
    flat = weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[item]).view(-1)
    per_word = 8 // item
    whole = flat.numel() // per_word * per_word if flat.storage_offset() % per_word == 0 else 0
    return int(flat[:whole].view(torch.int64).sum()) + int(flat[whole:].sum())
