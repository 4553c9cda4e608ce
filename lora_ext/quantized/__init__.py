"""The quantised weights that adapters can stand next to, and be merged into.

A new format is a subclass of :class:`QuantizedWeight` and an entry in ``FORMATS``. The libraries are found by the names
of their classes, and imported only once a layer of theirs exists. ``rescaled`` makes the same merging serve DoRA.
"""

from __future__ import annotations

from torch import nn

from lora_ext.quantized.bitsandbytes_weights import Linear4bitWeight, Linear8bitWeight
from lora_ext.quantized.torchao_weights import Float8Weight, Int8Weight, IntxWeight
from lora_ext.quantized.unsupported import why_unsupported
from lora_ext.quantized.weight import QuantizedWeight

__all__ = ["FORMATS", "QuantizedWeight", "keep_stored", "quantized_weight", "stop_keeping_stored", "why_unsupported"]

FORMATS: tuple[type[QuantizedWeight], ...] = (Linear4bitWeight, Linear8bitWeight, Int8Weight, IntxWeight, Float8Weight)


def quantized_weight(module: nn.Module, any_kind: bool = False) -> QuantizedWeight | None:
    """The quantised weight of a linear layer; None: it has none, or one of an unknown format.

    ``any_kind``: also of other modules that hold such a weight, like an embedding quantised by torchao.
    """
    if not (any_kind or isinstance(module, nn.Linear)):
        return None
    return next((kind(module) for kind in FORMATS if kind.holds(module)), None)


def keep_stored(model: nn.Module) -> None:
    """Keeps the quantised layers of ``model`` from rewriting their weights when they are called."""
    for module in model.modules():
        if (weight := quantized_weight(module)) is not None:
            weight.keep_stored()


def stop_keeping_stored(model: nn.Module) -> None:
    """Undoes :func:`keep_stored`."""
    for module in model.modules():
        if (weight := quantized_weight(module)) is not None:
            weight.stop_keeping_stored()
