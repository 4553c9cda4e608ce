"""Describes a quantised weight to merging and injection; one subclass for each format."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.quantized.grid import Grid


class QuantizedWeight(ABC):
    """The quantised weight of a linear layer, ``[out_features, in_features]``, in the format of its library.

    It holds no values itself: every method reads the layer as it is now.

    Args:
        module: the layer.
    """

    rounds: bool = True  # whether quantising again loses more than rounding to a dtype
    has_grid: bool = False  # whether :meth:`grid` returns one
    sum_dtype: torch.dtype = torch.float32  # in which updates are added

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @classmethod
    @abstractmethod
    def holds(cls, module: nn.Module) -> bool:
        """Returns whether the weight of ``module`` has this format, by names: the library may not be installed."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The format, for messages: ``"bitsandbytes NF4"``."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""

    @abstractmethod
    def stored(self) -> dict[str, Tensor]:
        """The live tensors whose bytes are the weight: codes and scales."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """The values that the codes stand for: a new float32 tensor, not rounded to :attr:`dtype`."""

    def values_to_update(self) -> Tensor:
        """Returns the values that a merge adds updates to: a new tensor, in :attr:`sum_dtype`."""
        return self.dequantize()

    @abstractmethod
    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        """Quantises float32 ``values`` in the format of this weight; keys, shapes and dtypes as in :meth:`stored`."""

    def grid(self, quantized: Mapping[str, Tensor]) -> Grid:
        """Returns the values that the weight can have with the scales of ``quantized``, made by :meth:`quantize`."""
        raise TypeError(
            f"weights of {self.name} are rounded to nearest only, but {type(self).__name__}.grid was called"
        )

    def write(self, stored: Mapping[str, Tensor]) -> None:
        """Copies the bytes of ``stored`` into the weight, in place."""
        for name, tensor in self.stored().items():
            tensor.copy_(stored[name])

    def why_not_adapt(self) -> str | None:
        """Returns the reason why no adapter can be trained next to this weight, or None."""
        return None

    def why_not_quantize(self) -> str | None:
        """Returns the reason why the sum of this weight and an update cannot be quantised, or None."""
        return None

    @property
    def plain_forward(self) -> type[nn.Module]:
        """The class whose forward multiplies by the weight, adds the bias and does nothing else."""
        return nn.Linear

    def keep_stored(self) -> None:
        """Keeps the layer from rewriting its stored bytes when it is called."""
        return

    def stop_keeping_stored(self) -> None:
        """Undoes :meth:`keep_stored`."""
        return


def class_names(thing: Any, library: str) -> frozenset[str]:
    """The names of the classes of ``thing`` that ``library`` defines."""
    return _names_in(type(thing), library)


@functools.lru_cache(256)  # asked of every layer of a model, several times
def _names_in(kind: type, library: str) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__ if base.__module__.partition(".")[0] == library)
