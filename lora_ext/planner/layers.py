"""A step of a deep model from two shallow ones: what is held is linear in the number of layers that are alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lora_ext.planner.step import FORWARD, HEAD_BACKWARD, Step, layer_backward
from lora_ext.planner.tracker import Peak

SAMPLES = (3, 4)
"""Numbers of layers to simulate. In three layers the first, one between, and the last are different ones."""


def layer_list(model: nn.Module, count: int | None) -> list[nn.Module]:
    """The ``count`` layers that the model repeats: those of its outermost ``nn.ModuleList`` of that length, or none."""
    if count is None:
        return []
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return list(next(lists, ()))


def are_alike(layers: list[nn.Module]) -> bool:
    """Whether all have the same modules and parameters, of the same shapes and dtypes, trained or frozen."""
    shapes = [_shape_of(layer) for layer in layers]
    return all(shape == shapes[0] for shape in shapes)


def _shape_of(layer: nn.Module) -> list[Any]:
    modules = [(path, type(module)) for path, module in layer.named_modules()]
    parameters = [(path, each.shape, each.dtype, each.requires_grad) for path, each in layer.named_parameters()]
    return [modules, parameters]


def extrapolated(steps: Mapping[int, Step], count: int) -> Step:
    """The step of a model of ``count`` layers from the steps of two with :data:`SAMPLES` layers.

    At any moment, counted from the beginning or from the end of the backward, what is held grows by the same bytes with
    every layer; so does the most in a part of the step. Between the second layer's backward and the last but one's it
    is linear in the layer's number, so that it is the most at one of the two.

    ValueError: the two steps do not consist of the same parts.
    """
    few, more = (steps[number] for number in SAMPLES)

    def line(of_few: int, of_more: int) -> int:
        return of_few + (of_more - of_few) * (count - SAMPLES[0])

    peaks = {}
    for name_of in _PARTS:
        names = [name_of(number) for number in (*SAMPLES, count)]
        if (names[0] in few.peaks) != (names[1] in more.peaks):
            raise ValueError(f"the {names[0]} is a part of one step, and not of the other")
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
