"""Replaces the classes of PEFT's layers by lora_ext's, and restores them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext.integrations.peft.linear import LinearForward
from lora_ext.integrations.peft.merging import has_exact_merges, set_rounding
from lora_ext.merging.rounding import stochastic_seed
from lora_ext.nn.input_groups import form_input_groups
from lora_ext.nn.shared_inputs import set_neighbours
from lora_ext.quantized import keep_stored, stop_keeping_stored

Model = TypeVar("Model", bound=nn.Module)

# Module of PEFT -> module with the counterparts of its classes, imported once such a layer exists.
_MODULES = {
    "peft.tuners.lora.layer": ".layers",
    "peft.tuners.lora.bnb": ".quantized",
    "peft.tuners.lora.torchao": ".quantized_torchao",
}

# PEFT's LoraLayer.__init__ and BaseTuner.inject_adapter, while accelerate() without a model is on.
_peft_init: Callable[..., None] | None = None
_peft_inject: Callable[..., None] | None = None


@checked
def accelerate(
    model: Model | None = None, *, share_inputs: bool = True, merge_rounding: str = "nearest", merge_seed: int = 0
) -> Model | None:
    """Makes the LoRA layers of a model adapted by PEFT run on lora_ext's ops, or those of all future models.

    Forward, backward, merge and unmerge of eligible layers use the ops; results equal PEFT's except rounding. The rest
    stays PEFT's code. :func:`report` says which layers are eligible, and why others are not.

    Two things differ. Dropout masks come from lora_ext's generator, which ``torch.manual_seed`` seeds: one mask for all
    layers that read one tensor, and not PEFT's. ``unmerge`` restores every bit of the weight from a record in the
    merged layer (0.03 to 0.25 bytes per element and the factors; ``merge_and_unload`` keeps none).

    Args:
        model: a ``PeftModel`` or any module with PEFT LoRA layers, changed in place and returned: the class of every
            layer becomes a subclass of itself. Layers that PEFT creates later need another call. None: all LoRA layers
            that PEFT creates from now on.
        share_inputs: compute layers that read one tensor (q/k/v, gate/up) in one op. They are found while the model
            runs; :func:`report` names them.
        merge_rounding: how PEFT's ``merge_adapter``, ``merge_and_unload`` and ``merge`` round from now on, as of
            :func:`lora_ext.merge`. "stochastic" needs a model, and plain weights of 16 bits. A weight rounded once has
            the bits that :func:`lora_ext.merge` gives it.
        merge_seed: of stochastic rounding.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``; "stochastic" for a weight of another dtype.
        ValueError: it has no PEFT LoRA layers; "stochastic" without a model or for a layer that PEFT merges. Nothing
            is changed.
    """
    seed = stochastic_seed("accelerate", merge_rounding, merge_seed)
    if model is None and seed is not None:
        raise ValueError("accelerate: merge_rounding='stochastic' is for the layers of a model; pass the model")
    if model is None:
        _accelerate_new_layers(share_inputs)
        return None
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no PEFT LoRA layers; adapt it first with get_peft_model() "
            "or inject_adapter_in_model()"
        )
    set_rounding(dict(lora_layers(model)), seed, accelerated_class)
    for layer in layers:
        _accelerate_layer(layer)
    keep_stored(model)
    _share_inputs(model, share_inputs)
    return model


@checked
def restore(model: Model | None = None) -> Model | None:
    """Undoes :func:`accelerate`: ``model``, or without a model future layers, run PEFT's code again.

    Models accelerated by ``accelerate()`` without a model stay accelerated until they are restored.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
        RuntimeError: an adapter is merged, and PEFT's ``unmerge`` would not restore the weight's bits. No layer is
            changed.
    """
    if model is None:
        _restore_new_layers()
        return None
    layers = dict(lora_layers(model))
    merged = [path for path, layer in layers.items() if has_exact_merges(layer)]
    if merged:
        raise RuntimeError(
            f"restore: adapters are merged into {len(merged)} layers ({merged[0]!r} first), whose weights only the "
            "accelerated layers can restore to the bit; call unmerge_adapter() first"
        )
    for layer in layers.values():
        if is_accelerated(layer):
            layer.__class__ = type(layer).__bases__[-1]
            set_neighbours(layer, None)
    stop_keeping_stored(model)
    return model


def _share_inputs(model: nn.Module, on: bool) -> None:
    kinds = {type(layer) for _, layer in lora_layers(model)}
    form_input_groups(model, on, tuple(kind for kind in kinds if issubclass(kind, LinearForward)))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yields paths and layers of all PEFT LoRA layers, of any class."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def is_accelerated(layer: LoraLayer) -> bool:
    return accelerated_class(type(layer).__bases__[-1]) is type(layer)


def accelerated_class(cls: type) -> type | None:
    """Returns lora_ext's subclass of a PEFT layer class, or None."""
    module = _MODULES.get(cls.__module__)
    return module and getattr(importlib.import_module(module, __package__), cls.__name__, None)


def _accelerate_layer(layer: LoraLayer) -> None:
    if counterpart := accelerated_class(type(layer)):
        layer.__class__ = counterpart
        keep_stored(layer.get_base_layer())


def _accelerate_new_layers(share_inputs: bool) -> None:
    global _peft_init, _peft_inject
    _restore_new_layers()
    _peft_init, _peft_inject = LoraLayer.__init__, BaseTuner.inject_adapter

    @functools.wraps(_peft_init)
    def init(self: LoraLayer, *args, **kwargs) -> None:
        init.__wrapped__(self, *args, **kwargs)
        _accelerate_layer(self)

    @functools.wraps(_peft_inject)
    def inject_adapter(self: BaseTuner, model: nn.Module, *args, **kwargs) -> None:
        inject_adapter.__wrapped__(self, model, *args, **kwargs)
        _share_inputs(model, share_inputs)

    LoraLayer.__init__, BaseTuner.inject_adapter = init, inject_adapter


def _restore_new_layers() -> None:
    global _peft_init, _peft_inject
    if _peft_init is not None:
        LoraLayer.__init__, BaseTuner.inject_adapter = _peft_init, _peft_inject
        _peft_init = _peft_inject = None
