"""torchao's weight-only formats: int8, int1 to int8 in groups (intx), float8."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ext.quantized.grid import Grid
from lora_ext.quantized.weight import QuantizedWeight, class_names

_INPUT_SETTINGS = ("act_quant_kwargs", "activation_quantization")  # how the input is quantised, or None


class _TorchaoWeight(QuantizedWeight):
    tensor_class: ClassVar[str]

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return cls.tensor_class in class_names(module._parameters.get("weight"), "torchao")

    @property
    def _weight(self) -> Any:
        return self.module._parameters["weight"]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self._weight.shape)

    def stored(self) -> dict[str, Tensor]:
        names, _ = self._weight.__tensor_flatten__()
        return {name: getattr(self._weight, name) for name in names}

    def _tensors_of(self, new: Any) -> dict[str, Tensor]:
        return {name: getattr(new, name) for name in self.stored()}

    def why_not_adapt(self) -> str | None:
        if any(getattr(self._weight, name, None) is not None for name in _INPUT_SETTINGS):
            return (
                f"torchao ({type(self._weight).__name__}) quantises its input too, and passes no gradient to it; use a "
                "weight-only config, such as Int8WeightOnlyConfig"
            )
        return None

    def why_not_quantize(self) -> str | None:
        if getattr(self._weight, "act_pre_scale", None) is not None:
            return "its input is scaled before the product (act_pre_scale); run unmerged"
        return None

    @property
    def _granularity(self) -> Any:
        from torchao.quantization import PerGroup, PerRow, PerTensor

        block, (rows, columns) = list(self._weight.block_size or ()), self.shape
        if block in ([], [rows, columns]):
            return PerTensor()
        return PerRow() if block == [1, columns] else PerGroup(block[-1])

    @property
    def _mapping(self) -> Any:
        from torchao.quantization.quant_primitives import MappingType

        zeros = getattr(self._weight, "zero_point", None)
        return MappingType.SYMMETRIC if zeros is None or not zeros.any() else MappingType.ASYMMETRIC


class Int8Weight(_TorchaoWeight):
    """``Int8WeightOnlyConfig``: codes of 8 bits, a scale for each row, group or tensor."""

    tensor_class = "Int8Tensor"
    has_grid = True

    @property
    def name(self) -> str:
        return "torchao int8"

    def dequantize(self) -> Tensor:
        return self._weight.detach().dequantize(torch.float32)

    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        from torchao.quantization import Int8Tensor

        how = {"mapping_type": self._mapping, "reduce_range": self._weight.reduce_range}
        chosen = Int8Tensor.from_hp(values, self._granularity, **how)
        how["scale"] = chosen.scale.to(self._weight.scale.dtype)
        if self._weight.zero_point is not None:
            how["zero_point"] = chosen.zero_point
        return self._tensors_of(Int8Tensor.from_hp(values, self._granularity, **how))

    def grid(self, quantized: Mapping[str, Tensor]) -> Grid:
        rows, columns = self.shape
        scale = quantized["scale"].float().expand(rows, -1).T.contiguous()
        zero = quantized.get("zero_point")
        if zero is not None:
            zero = zero.float().expand(rows, -1).T.contiguous()
        limits = (-64, 63) if self._weight.reduce_range else (-128, 127)
        inverse = (1 / scale).nan_to_num(posinf=0)

        def pack(codes: Tensor) -> dict[str, Tensor]:
            return {**quantized, "qdata": codes.to(torch.int8)}

        return Grid(scale, inverse, columns // len(scale), pack, limits, zero)


class IntxWeight(_TorchaoWeight):
    """``IntxWeightOnlyConfig``: codes of 1 to 8 bits, one in a byte, with a scale for each group or row."""

    tensor_class = "IntxUnpackedToInt8Tensor"

    @property
    def name(self) -> str:
        return f"torchao {str(self._weight.target_dtype).removeprefix('torch.')}"

    def dequantize(self) -> Tensor:
        return self._weight.detach().to(torch.float32).dequantize()

    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        from torchao.quantization import IntxUnpackedToInt8Tensor

        old = self._weight
        chosen = IntxUnpackedToInt8Tensor.from_hp(values, old.block_size, old.target_dtype, mapping_type=self._mapping)
        new = IntxUnpackedToInt8Tensor.from_hp(
            values,
            old.block_size,
            old.target_dtype,
            intx_choose_qparams_algorithm=None,
            custom_scale=chosen.scale.to(old.scale.dtype),  # 16 bits in a 16-bit model
            custom_zero_point=chosen.zero_point.to(old.zero_point.dtype),
        )
        return self._tensors_of(new)


class Float8Weight(_TorchaoWeight):
    """``Float8WeightOnlyConfig``: float8 numbers and a scale for each row or tensor."""

    tensor_class = "Float8Tensor"

    @property
    def name(self) -> str:
        return f"torchao {str(self._weight.qdata.dtype).removeprefix('torch.')}"

    def dequantize(self) -> Tensor:
        return self._weight.detach().dequantize(torch.float32)

    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        from torchao.quantization import Float8Tensor

        return self._tensors_of(
            Float8Tensor.from_hp(
                values,
                self._weight.qdata.dtype,
                self._granularity,
                kernel_preference=self._weight.kernel_preference,
            )
        )
