"""``finetune --quantize``: quantises the frozen weights as they are loaded.

This is QLoRA (Dettmers et al. 2023, arXiv 2305.14314). All linear layers are quantised, except the new head, the output
head of a language model, and modules that are trained in full.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_ext._common.install_hint import install_hint
from lora_ext.methods import METHODS, head_parameters
from lora_ext.quantized import keep_stored, quantized_weight
from lora_ext.tasks import TaskError

if TYPE_CHECKING:
    from lora_ext.tasks.finetune.settings import Settings

QUANTIZE = ("nf4", "int8")
"""nf4: 4 bits, double quantisation. int8: 8 bits (LLM.int8). Both by bitsandbytes, on the CPU and on CUDA."""

QUANTIZABLE = tuple(name for name in METHODS if name != "full")
"""The methods that train no weight of a quantised layer."""


def check_quantize(name: str | None, method: str) -> None:
    """Raises a TaskError if there is no such quantisation, or ``method`` trains the weights."""
    if name is not None and name not in QUANTIZE:
        raise TaskError(f"--quantize is {name!r}, want one of {', '.join(QUANTIZE)}")
    if name is not None and (wrong := set(method.split("+")).difference(QUANTIZABLE)):
        raise TaskError(
            f"--quantize {name} freezes the weights, and --method {wrong.pop()} trains them; choose one of "
            f"{', '.join(QUANTIZABLE)}, or leave --quantize out"
        )


@dataclass(frozen=True)
class Quantization:
    """The quantisation of the base model.

    Attributes:
        name: one of ``QUANTIZE``.
        compute: dtype of the products with 4-bit weights.
        trained: names of modules to train in full.
    """

    name: str
    compute: torch.dtype
    trained: tuple[str, ...]

    def options(self, path: str, auto_class: Any, options: dict[str, Any], **config: Any) -> dict[str, Any]:
        """Returns the arguments of ``from_pretrained`` that quantise the model at ``path``.

        Args:
            auto_class: the class of Transformers that loads it.
            options: of loading its config, such as ``local_files_only``.
            config: changes of its config, such as ``num_labels``.

        Raises:
            TaskError: the checkpoint is quantised already. Transformers would load it as it is.
        """
        from transformers import AutoConfig, BitsAndBytesConfig

        known = AutoConfig.from_pretrained(path, **config, **options)
        if getattr(known, "quantization_config", None) is not None:
            raise TaskError(f"--quantize {self.name}: {path} is quantised already; leave out --quantize")
        with torch.device("meta"):
            skeleton = auto_class.from_config(known)
        skipped = {name.rpartition(".")[0] for name in head_parameters(skeleton)}
        last = skeleton.get_output_embeddings()
        for name, module in skeleton.named_modules():
            if module is last or name.endswith(self.trained):
                skipped.add(name)
        how: dict[str, Any] = {"load_in_8bit": True}
        if self.name == "nf4":
            how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
            how["bnb_4bit_compute_dtype"] = self.compute
        return {"quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=sorted(skipped))}


def quantization_of(settings: Settings) -> Quantization | None:
    """Returns what ``settings`` ask for; None: nothing is quantised. TaskError: bitsandbytes is not installed."""
    if settings.quantize is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise TaskError(f"--quantize {settings.quantize} needs bitsandbytes: {install_hint('quantize')}")
    trained = tuple(name.strip() for name in (settings.modules_to_save or "").split(",") if name.strip())
    compute = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    return Quantization(settings.quantize, compute, trained)


def tame_bitsandbytes(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit weights, until ``stop_keeping_stored``; where it would fail, for good.

    On CPUs with AVX512-BF16 the first forward in evaluation packs a weight. Rows must then be whole blocks, and their
    number a multiple of 32. That rounds the scales, and the layer passes no gradient any more: neither do layers of
    other models that share the weight, such as the adapted one when its bare model is evaluated.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports every cast of an 8-bit layer's input
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            block = module.weight.quant_state.blocksize
            if module.in_features % block or module.out_features % 32:
                module.support_avx512bf16_for_cpu = False
    keep_stored(model)


@contextmanager
def inputs_not_quantised(model: nn.Module) -> Iterator[None]:
    """Lets 8-bit layers multiply their input as it is, by the dequantised weight, as they do in training.

    In evaluation LLM.int8 quantises the input, except features in which any token of the batch has an outlier. In
    models with large outliers a token thus changes the others by a fifth of the largest output.
    """
    layers = [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(_product, layer)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:  # of accelerate's hooks
                layer.forward = forward


def _product(layer: nn.Module, x: Tensor) -> Tensor:
    weight = quantized_weight(layer).dequantize().to(x.dtype)
    return nn.functional.linear(x, weight, None if layer.bias is None else layer.bias.to(x.dtype))


def tensors_of_8bit(model: nn.Module) -> Iterator[Tensor]:
    """Yields the codes and scales that the 8-bit layers of ``model`` hold outside of their parameters.

    The first call of such a layer moves them from the parameter to the layer; that is done here, because a copy that
    shares the parameter would find nothing there.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            if module.weight.CB is not None:
                module.init_8bit_state()
            yield module.state.CB
            yield module.state.SCB
