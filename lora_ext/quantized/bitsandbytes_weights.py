"""The weights of bitsandbytes' ``Linear4bit`` (NF4, FP4, double quantisation) and ``Linear8bitLt`` (LLM.int8)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.quantized.grid import Grid
from lora_ext.quantized.weight import QuantizedWeight, class_names

_NOT_YET = "it is not quantised yet; move the model to its device first (model.to(...))"
_REPACKS, _REPACKS_BEFORE = "support_avx512bf16_for_cpu", "_support_avx512bf16_for_cpu_before_lora"


class Linear4bitWeight(QuantizedWeight):
    """Codes of 4 bits; a scale for each block, quantised again to 8 bits with double quantisation.

    On CPUs with AVX512-BF16 a call in eval mode packs the weight for a bfloat16 product: it rounds the scales, and the
    next training step fails or passes no gradient. :meth:`keep_stored` switches that off.
    """

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return "Linear4bit" in class_names(module, "bitsandbytes")

    @property
    def _state(self) -> Any:
        """The library's ``QuantState``, or None before the weight is quantised."""
        weight = self.module.weight
        return getattr(weight, "quant_state", None) or self.module.quant_state

    @property
    def has_grid(self) -> bool:
        """Where blocks are parts of rows. Of others, bitsandbytes 0.50 reads other scales on CPUs than it wrote."""
        return self._state is not None and self.module.in_features % self._state.blocksize == 0

    @property
    def name(self) -> str:
        return f"bitsandbytes {self.module.weight.quant_type.upper()}"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    def stored(self) -> dict[str, Tensor]:
        self._unpack()
        state = self._state
        tensors = {"weight": self.module.weight.data, "absmax": state.absmax}
        return tensors | ({"offset": state.offset, "nested_absmax": state.state2.absmax} if state.nested else {})

    def dequantize(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        self._unpack()
        state = copy.copy(self._state)
        state.dtype = torch.float32
        return dequantize_4bit(self.module.weight.data, state)

    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        state = self._state
        codes, new = quantize_4bit(
            values,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self.module.weight.dtype,
        )
        tensors = {"weight": codes.view(self.module.weight.shape), "absmax": new.absmax}
        return tensors | ({"offset": new.offset, "nested_absmax": new.state2.absmax} if state.nested else {})

    def grid(self, quantized: Mapping[str, Tensor]) -> Grid:
        from bitsandbytes.functional import dequantize_blockwise

        state, scales = self._state, quantized["absmax"]
        if state.nested:
            nested = copy.copy(state.state2)
            nested.absmax = quantized["nested_absmax"]
            scales = dequantize_blockwise(scales, nested) + quantized["offset"]
        scale = scales.float().view(self.shape[0], -1).T.contiguous()
        table, code_at = state.code.float().sort()

        def pack(positions: Tensor) -> dict[str, Tensor]:
            codes, stored = code_at[positions.long()].to(torch.uint8).flatten(), self.module.weight
            return {**quantized, "weight": (codes[::2] << 4 | codes[1::2]).view(stored.dtype).view(stored.shape)}

        return Grid(scale, 1 / scale.clamp(min=1e-38), state.blocksize, pack, table=table)

    def why_not_quantize(self) -> str | None:
        return _NOT_YET if self._state is None or self.module.weight.is_meta else None

    @property
    def plain_forward(self) -> type[nn.Module]:
        from bitsandbytes.nn import Linear4bit

        return Linear4bit

    def keep_stored(self) -> None:
        state = vars(self.module)
        if _REPACKS in state and _REPACKS_BEFORE not in state:
            state[_REPACKS_BEFORE], state[_REPACKS] = state[_REPACKS], False
        self._unpack()

    def stop_keeping_stored(self) -> None:
        state = vars(self.module)
        if _REPACKS_BEFORE in state:
            state[_REPACKS] = state.pop(_REPACKS_BEFORE)

    def _unpack(self) -> None:
        """Undoes the packing of an earlier call in eval mode, as the layer's ``state_dict`` does."""
        if getattr(self._state, "packing_format_for_cpu", False):
            self.module.state_dict()
        state = self._state
        if state is not None and state.absmax.dim() == 2:
            # Without double quantisation bitsandbytes 0.50 leaves the scales as packed, bfloat16 [blocks of a row,
            # out_features], and reads them as [out_features, blocks of a row].
            state.absmax = state.absmax.T.flatten().float()


class Linear8bitWeight(QuantizedWeight):
    """Codes of 8 bits and a scale for each row. In eval mode the layer also quantises its input, row by row."""

    has_grid = True

    @classmethod
    def holds(cls, module: nn.Module) -> bool:
        return "Linear8bitLt" in class_names(module, "bitsandbytes")

    @property
    def name(self) -> str:
        return "bitsandbytes int8"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def _scales(self) -> Tensor | None:
        """The largest absolute value of each row, float32; the first call of the layer moves it."""
        scales = getattr(self.module.weight, "SCB", None)
        return self.module.state.SCB if scales is None else scales

    def stored(self) -> dict[str, Tensor]:
        weight, codes = self.module.weight, {}
        copies = {"weight": weight.data, "CB": getattr(weight, "CB", None), "state.CB": self.module.state.CB}
        for name, tensor in copies.items():  # usually one tensor under several names, but not in a copied layer
            if tensor is not None and all(tensor.data_ptr() != other.data_ptr() for other in codes.values()):
                codes[name] = tensor
        return codes | {"SCB": self._scales}

    def dequantize(self) -> Tensor:
        return self.module.weight.data.float() * (self._scales.float() / 127)[:, None]

    def quantize(self, values: Tensor) -> dict[str, Tensor]:
        # The library's own function takes float16 only, which overflows and rounds.
        scales = values.abs().amax(dim=1)
        codes = (values * (127 / scales).nan_to_num(posinf=0)[:, None]).round().to(torch.int8)
        return dict.fromkeys(self.stored(), codes) | {"SCB": scales.to(self._scales.dtype)}

    def grid(self, quantized: Mapping[str, Tensor]) -> Grid:
        scales = quantized["SCB"].float()[None]

        def pack(codes: Tensor) -> dict[str, Tensor]:
            return dict.fromkeys(quantized, codes.to(torch.int8)) | {"SCB": quantized["SCB"]}

        inverse = (127 / scales).nan_to_num(posinf=0)
        return Grid(scales / 127, inverse, self.shape[1], pack, limits=(-127, 127))

    def why_not_adapt(self) -> str | None:
        if self.module.state.has_fp16_weights:
            return "it keeps 16-bit weights and quantises them in each call; set has_fp16_weights=False"
        return None

    def why_not_quantize(self) -> str | None:
        return _NOT_YET if self.module.weight.dtype != torch.int8 or self._scales is None else None

    @property
    def plain_forward(self) -> type[nn.Module]:
        from bitsandbytes.nn import Linear8bitLt

        return Linear8bitLt
