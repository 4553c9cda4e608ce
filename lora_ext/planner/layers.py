"""Extrapolates a step of a deep model from two shallow ones: memory is linear in the number of equal layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_ext.planner.step import FORWARD, HEAD_BACKWARD, Step, layer_backward
from lora_ext.planner.tracker import Peak

SAMPLES = (3, 4)
"""Numbers of layers to simulate. With three layers the first, middle and last are distinct."""


def layer_list(model: nn.Module, count: int | None) -> list[nn.Module]:
    """Returns the ``count`` repeated layers: the outermost ``nn.ModuleList`` of that length, or []."""
    if count is None:
        return []
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))


def are_alike(layers: list[nn.Module]) -> bool:
    """Returns whether all layers have equal modules and equal shapes, dtypes and flags of parameters."""
    shapes = [_shape_of(layer) for layer in layers]
    return all(shape == shapes[0] for shape in shapes)


def _shape_of(layer: nn.Module) -> list[Any]:
    modules = [(path, type(module)) for path, module in layer.named_modules()]
    parameters = [(path, p.shape, p.dtype, p.requires_grad) for path, p in layer.named_parameters()]
    return [modules, parameters]


def extrapolated(steps: Mapping[int, Step], count: int) -> Step:
    """Computes the step of a model of ``count`` layers from the steps of models with :data:`SAMPLES` layers.

    At a given distance from the start or end of the backward, every layer adds the same bytes to the memory, and to
    the peak of a part of the step. From the second layer's backward to the second-last's, peaks are linear in the
    layer's number, so the largest is at one of the two.

    ValueError: the two steps have different parts.
    """
    few, more = (steps[number] for number in SAMPLES)

    def line(of_few: int, of_more: int) -> int:
        return of_few + (of_more - of_few) * (count - SAMPLES[0])

    peaks = {}
    for name_of in _PARTS:
        names = [name_of(number) for number in (*SAMPLES, count)]
        if (names[0] in few.peaks) != (names[1] in more.peaks):
            raise ValueError(f"{names[0]!r} is a part of only one of the two steps")
        if names[0] in few.peaks:
            pairs = zip(few.peaks[names[0]], more.peaks[names[1]], strict=True)
            peaks[names[2]] = Peak(*(line(*pair) for pair in pairs))
    return Step(line(few.activations, more.activations), peaks)


_PARTS: list[Callable[[int], str]] = [
    lambda count: FORWARD,
    lambda count: HEAD_BACKWARD,
    lambda count: layer_backward(count - 1),
    lambda count: layer_backward(count - 2),
    lambda count: layer_backward(1),
    lambda count: layer_backward(0),
]
