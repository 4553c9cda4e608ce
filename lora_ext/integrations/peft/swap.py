"""Putting our layers in PEFT's places, and taking them out again."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import TypeVar

from peft.tuners.lora import LoraLayer
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext.integrations.peft.merging import has_exact_merges

Model = TypeVar("Model", bound=nn.Module)

# Where the counterparts of the classes of one of PEFT's modules are, under the same names. Imported when there is such
# a layer: PEFT's module then is imported already, and what it needs with it.
_MODULES = {"peft.tuners.lora.layer": ".layers", "peft.tuners.lora.bnb": ".quantized"}

_peft_init: Callable[..., None] | None = None  # of LoraLayer, while accelerate() without a model is in force


@checked
def accelerate(model: Model | None = None) -> Model | None:
    """Lets the LoRA layers of a model that PEFT has adapted run on lora_ext's ops; or of all models to come.

    Forward, backward, merge and unmerge of the eligible layers then go through the ops, with results equal to PEFT's
    but for rounding; everything else stays PEFT's own code: adapters, config, state dict, saving, ``add_adapter``,
    ``set_adapter``, mixed batches. :func:`report` tells which layers are eligible, and why the others are not.

    What differs: dropout draws its masks from lora_ext's generator (seeded by PyTorch's, so ``torch.manual_seed``
    reproduces a run, with other masks than PEFT's); ``unmerge`` restores every bit of the weight, for which a merged
    layer holds a record (0.03 to 0.25 bytes per element and the factors; ``merge_and_unload`` keeps none); gradients of
    gradients (``create_graph=True``) raise RuntimeError: call :func:`restore` where you need them.

    Args:
        model: a ``PeftModel`` or any module with PEFT's LoRA layers in it, changed in place: each layer's class becomes
            a subclass of its own. Layers that PEFT creates in it later need another call. None: every LoRA layer that
            PEFT creates from now on, in whatever model.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it has no LoRA layers of PEFT's.
    """
    if model is None:
        _accelerate_new_layers()
        return None
    layers = [layer for _, layer in lora_layers(model)]
    if not layers:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no LoRA layers of PEFT's; adapt it first, with get_peft_model() "
            "or inject_adapter_in_model()"
        )
    for layer in layers:
        _accelerate_layer(layer)
    return model


@checked
def restore(model: Model | None = None) -> Model | None:
    """Undoes :func:`accelerate`: ``model`` runs PEFT's own code again; or, without a model, layers to come do.

    Models that ``accelerate()`` without a model has accelerated stay so until they are restored themselves.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        RuntimeError: an adapter is merged into it. PEFT's ``unmerge`` would not restore the weight's bits. All layers
            then are as they were.
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
    return model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Paths and layers, of any class, that PEFT has put a LoRA on."""
    return ((path, module) for path, module in model.named_modules() if isinstance(module, LoraLayer))


def is_accelerated(layer: LoraLayer) -> bool:
    return accelerated_class(type(layer).__bases__[-1]) is type(layer)


def accelerated_class(cls: type) -> type | None:
    """Our subclass of one of PEFT's layer classes, or None."""
    module = _MODULES.get(cls.__module__)
    return module and getattr(importlib.import_module(module, __package__), cls.__name__, None)


def _accelerate_layer(layer: LoraLayer) -> None:
    if counterpart := accelerated_class(type(layer)):
        layer.__class__ = counterpart


def _accelerate_new_layers() -> None:
    global _peft_init
    if _peft_init is not None:
        return
    _peft_init = LoraLayer.__init__

    @functools.wraps(_peft_init)
    def init(self: LoraLayer, *args, **kwargs) -> None:
        init.__wrapped__(self, *args, **kwargs)
        _accelerate_layer(self)

    LoraLayer.__init__ = init


def _restore_new_layers() -> None:
    global _peft_init
    if _peft_init is not None:
        LoraLayer.__init__, _peft_init = _peft_init, None
