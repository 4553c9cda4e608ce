"""Bytes of a model's weights for every dtype of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_ext.model.bare_model import BareModel, root_module
from lora_ext.nn.linear import is_linear, linear_sizes


@dataclass(frozen=True)
class WeightDtype:
    """A storage format of frozen weights.

    Attributes:
        compute: dtype of activations and of weights that are not quantised.
        bits: bits per weight, without scales.
        linear_bytes: ``(in_features, out_features)`` -> weight bytes of a frozen linear layer; None: unquantised.
    """

    compute: torch.dtype
    bits: int
    linear_bytes: Callable[[int, int], int] | None = None

    @property
    def compute_name(self) -> str:
        """The name of ``compute`` among :data:`WEIGHT_DTYPES`."""
        return str(self.compute).removeprefix("torch.")


def _int8_bytes(in_features: int, out_features: int) -> int:
    return in_features * out_features + 4 * out_features


def _nf4_bytes(in_features: int, out_features: int) -> int:
    count = in_features * out_features
    return -(-count // 2) + 4 * -(-count // 64)


WEIGHT_DTYPES = {
    "float32": WeightDtype(torch.float32, 32),
    "bfloat16": WeightDtype(torch.bfloat16, 16),
    "float16": WeightDtype(torch.float16, 16),
    # A byte, and a float32 scale for each row: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
    "int8": WeightDtype(torch.bfloat16, 8, _int8_bytes),
    # Half a byte, and a float32 scale for every 64: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
    "nf4": WeightDtype(torch.bfloat16, 4, _nf4_bytes),
}
"""Formats by name. As with bitsandbytes in Transformers, all linear layers except the output head are quantised."""


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's parameters and buffers.

    Attributes:
        total: bytes of all of them.
        unpacked: bytes of the largest quantised weight in the compute dtype; it exists while its layer is computed.
    """

    total: int
    unpacked: int


def weight_bytes(model: nn.Module, dtype: WeightDtype) -> WeightBytes:
    """Counts the bytes of an adapted ``model`` in ``dtype.compute``, on any device.

    ValueError: ``dtype`` quantises frozen linear layers, but there are none.
    """
    total = tensor_bytes([*model.parameters(), *model.buffers()])
    if dtype.linear_bytes is None:
        return WeightBytes(total, 0)
    bare = BareModel(root_module(model))
    layers = [
        module
        for module in bare.modules.values()
        if is_linear(module) and module is not bare.head and not module.weight.requires_grad
    ]
    if not layers:
        raise ValueError("only frozen linear layers can be quantised, and there are none")
    packed = sum(dtype.linear_bytes(*linear_sizes(layer)) for layer in layers)
    return WeightBytes(
        total - sum(layer.weight.nbytes for layer in layers) + packed, max(layer.weight.nbytes for layer in layers)
    )


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
