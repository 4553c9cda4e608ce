"""Layers and models with quantised weights, one for each format that runs on this machine."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from support.optional import bitsandbytes, torchao  # noqa: F401
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        PerGroup,
        quantize_,
    )

from lora_ext.quantized import quantized_weight


def _bitsandbytes(kind: str, **options: object) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        sizes, dtype = (linear.in_features, linear.out_features), linear.weight.dtype
        if kind == "Linear4bit":
            options["compute_dtype"] = dtype
        with torch.device("cpu"):
            layer = getattr(bitsandbytes.nn, kind)(*sizes, bias=linear.bias is not None, **options).to(dtype)
        layer.load_state_dict(linear.state_dict())
        return layer.to(linear.weight.device)  # moving from the CPU quantises, also to the CPU

    return make


def _torchao(config: Callable[[], object]) -> Callable[[nn.Linear], nn.Module]:
    def make(linear: nn.Linear) -> nn.Module:
        layer = copy.deepcopy(linear)
        quantize_(layer, config())
        return layer.requires_grad_(False)

    return make


QUANTIZE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": _bitsandbytes("Linear4bit", quant_type="nf4", compress_statistics=False),
    "nf4-double": _bitsandbytes("Linear4bit", quant_type="nf4", compress_statistics=True),
    "fp4": _bitsandbytes("Linear4bit", quant_type="fp4", compress_statistics=False),
    "int8": _bitsandbytes("Linear8bitLt", has_fp16_weights=False, threshold=6.0),
    "torchao-int8": _torchao(Int8WeightOnlyConfig),
    "torchao-int8-group": _torchao(lambda: Int8WeightOnlyConfig(granularity=PerGroup(32), group_size=None)),
    "torchao-int4": _torchao(lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
    "torchao-float8": _torchao(Float8WeightOnlyConfig),
}
"""Functions that quantise an ``nn.Linear``, by format; the argument is unchanged."""


def quantized_copy(model: nn.Module, format: str, skip: tuple[str, ...] = ()) -> nn.Module:
    """A copy of ``model`` with every linear layer quantised, except those whose name is in ``skip``."""
    model = copy.deepcopy(model)
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path.rpartition(".")[2] not in skip:
            model.set_submodule(path, QUANTIZE[format](module))
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the bytes of all quantised weights in ``model``."""
    return {
        f"{path}:{name}": tensor.detach().contiguous().clone().view(-1).view(torch.uint8)
        for path, module in model.named_modules()
        if (weight := quantized_weight(module)) is not None
        for name, tensor in weight.stored().items()
    }


@contextmanager
def unchanged_bytes(model: nn.Module) -> Iterator[None]:
    """Checks that the block leaves every byte of the quantised weights as it was."""
    before = stored(model)
    assert before
    yield
    torch.testing.assert_close(stored(model), before, rtol=0, atol=0)
