"""Prepares a model with quantised weights for training next to them."""

from __future__ import annotations

from torch import nn

from lora_ext.quantized import keep_stored, stop_keeping_stored

_MARK, _MARK_BEFORE = "is_quantized", "_is_quantized_before_lora"


def prepare_quantized(model: nn.Module) -> None:
    """Keeps the quantised layers of ``model`` from rewriting their weights in calls, and makes trainers accept it.

    Transformers' Trainer refuses a model that is marked as quantised unless PEFT adapts it: the mark is taken off.
    """
    keep_stored(model)
    for module in model.modules():
        if vars(module).get(_MARK) is True:
            vars(module)[_MARK], vars(module)[_MARK_BEFORE] = False, True


def release_quantized(model: nn.Module) -> None:
    """Undoes :func:`prepare_quantized`."""
    stop_keeping_stored(model)
    for module in model.modules():
        if vars(module).pop(_MARK_BEFORE, False):
            vars(module)[_MARK] = True
