"""Bytes of weights and of optimizer states, exactly, for every dtype of frozen weights and every optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from torch import Tensor, nn

from lora_ext.model.bare_model import BareModel, root_module
from lora_ext.nn.linear import is_linear, linear_sizes


class WeightDtype(NamedTuple):
    """A storage format of frozen weights."""

    compute: str  # PyTorch's name of the dtype of activations, and of weights that are not quantised
    bits: int  # per weight, without scales
    packed_bytes: Callable[[int, int], int] | None = None  # (rows, elements) of a linear layer; None: unquantised


WEIGHT_DTYPES = {
    "float32": WeightDtype("float32", 32),
    "bfloat16": WeightDtype("bfloat16", 16),
    "float16": WeightDtype("float16", 16),
    # A byte, and a float32 scale for each row: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339).
    "int8": WeightDtype("bfloat16", 8, lambda rows, elements: elements + 4 * rows),
    # Half a byte, and a float32 scale for every 64: QLoRA (Dettmers et al. 2023, arXiv 2305.14314).
    "nf4": WeightDtype("bfloat16", 4, lambda rows, elements: -(-elements // 2) + 4 * -(-elements // 64)),
}
"""Formats by name. As with bitsandbytes in Transformers, all linear layers except the output head are quantised."""

_STEP = 4  # the step count, one float32 per parameter


def _adamw(parameter: Tensor) -> int:
    return 2 * parameter.nbytes + _STEP


def _adamw_master(parameter: Tensor) -> int:
    return 12 * parameter.numel() + _STEP if parameter.itemsize == 2 else _adamw(parameter)


def _adamw8bit(parameter: Tensor) -> int:
    if parameter.numel() < 4096:  # bitsandbytes keeps these in float32
        return 2 * 4 * parameter.numel()
    return 2 * (parameter.numel() + 4 * -(-parameter.numel() // 256))


def _adafactor(parameter: Tensor) -> int:
    if parameter.dim() < 2:
        return parameter.nbytes + _STEP
    numbers = parameter.numel() // parameter.shape[-1] + parameter.numel() // parameter.shape[-2]
    return numbers * parameter.itemsize + _STEP


OPTIMIZERS: dict[str, Callable[[Tensor], int]] = {
    # Two moments in the parameter's dtype: torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).
    "adamw": _adamw,
    # For 16-bit parameters a float32 copy and two float32 moments: mixed precision (Micikevicius et al. 2018, arXiv
    # 1710.03740), the 12 bytes a parameter of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).
    "adamw-master": _adamw_master,
    # Two moments in 8 bits, a float32 scale for every 256: bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861).
    "adamw8bit": _adamw8bit,
    # A moment of each row and each column: torch.optim.Adafactor (Shazeer and Stern 2018, arXiv 1804.04235).
    "adafactor": _adafactor,
    # A moment in the parameter's dtype: torch.optim.SGD.
    "sgd-momentum": lambda parameter: parameter.nbytes,
    "sgd": lambda parameter: 0,
}
"""Optimizers by name: the bytes of the state of one trained parameter."""


def weight_bytes(model: nn.Module, dtype: WeightDtype) -> tuple[int, int]:
    """Returns the bytes of an adapted model's parameters and buffers, and of its largest quantised weight unpacked.

    ``model`` is in ``dtype.compute``. ValueError: nothing can be quantised, as no linear layer is frozen.
    """
    total = tensor_bytes([*model.parameters(), *model.buffers()])
    if dtype.packed_bytes is None:
        return total, 0
    bare = BareModel(root_module(model))
    linear = [module for module in bare.modules.values() if is_linear(module) and module is not bare.head]
    layers = [layer for layer in linear if not layer.weight.requires_grad]
    if not layers:
        raise ValueError("only frozen linear layers can be quantised, and there are none")
    plain = [layer.weight.nbytes for layer in layers]
    packed = sum(dtype.packed_bytes(linear_sizes(layer)[1], layer.weight.numel()) for layer in layers)
    return total - sum(plain) + packed, max(plain)


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns the module's distinct parameters that require gradients."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
