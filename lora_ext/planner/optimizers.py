"""Bytes of optimizer state per parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

_STEP = 4  # the step count, one float32 per parameter


@dataclass(frozen=True)
class Optimizer:
    """The memory model of an optimizer.

    Attributes:
        parameter_bytes: state bytes of one parameter.
    """

    parameter_bytes: Callable[[Tensor], int]

    def state_bytes(self, parameters: Iterable[Tensor]) -> int:
        """Returns the bytes of the state for the trained ``parameters``."""
        return sum(self.parameter_bytes(parameter) for parameter in parameters)


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
    *leading, rows, columns = parameter.shape
    for size in leading:
        rows, columns = rows * size, columns * size
    return (rows + columns) * parameter.itemsize + _STEP


OPTIMIZERS = {
    # Two moments in the parameter's dtype: torch.optim.AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101).
    "adamw": Optimizer(_adamw),
    # For 16-bit parameters a float32 copy and two float32 moments: mixed precision (Micikevicius et al. 2018, arXiv
    # 1710.03740), the 12 bytes a parameter of ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054).
    "adamw-master": Optimizer(_adamw_master),
    # Two moments in 8 bits, a float32 scale for every 256: bitsandbytes (Dettmers et al. 2022, arXiv 2110.02861).
    "adamw8bit": Optimizer(_adamw8bit),
    # A moment of each row and each column: torch.optim.Adafactor (Shazeer and Stern 2018, arXiv 1804.04235).
    "adafactor": Optimizer(_adafactor),
    # A moment in the parameter's dtype: torch.optim.SGD.
    "sgd-momentum": Optimizer(lambda parameter: parameter.nbytes),
    "sgd": Optimizer(lambda parameter: 0),
}
