"""Names the quantisation of modules that no format here describes."""

from __future__ import annotations

from torch import nn

from lora_ext.quantized.weight import class_names

_LIBRARIES = ("aqlm", "auto_gptq", "awq", "compressed_tensors", "eetq", "fbgemm_gpu", "gptqmodel", "hqq", "optimum")
_LIBRARIES += ("quark", "spqr_quant", "vptq")
_TENSORS = ("W_q", "qweight", "weight_packed", "weight_scale", "weight_scale_inv")  # of HQQ, GPTQ and AWQ, FP8, ...
_KNOWN = "load the model with BitsAndBytesConfig or a weight-only TorchAoConfig, or without quantisation"


def why_unsupported(module: nn.Module) -> str | None:
    """Says how ``module`` is quantised, with the remedy; None if the module has no quantised weight.

    For modules without a format in ``FORMATS``, such as quantised embeddings.
    """
    kind, weight = type(module), module._parameters.get("weight")
    library = kind.__module__.partition(".")[0]
    if library == "bitsandbytes":
        return (
            f"it is quantised as bitsandbytes {kind.__name__}, and only Linear4bit and Linear8bitLt can be adapted; "
            f"leave it out, or {_KNOWN}"
        )
    if names := class_names(weight, "torchao"):
        name = type(weight).__name__ if type(weight).__name__ in names else min(names)
        if name.startswith("Int4"):
            return (
                f"its weight is a torchao {name}, whose kernels compute no gradient; use "
                "IntxWeightOnlyConfig(weight_dtype=torch.int4), Int8WeightOnlyConfig, or bitsandbytes' NF4"
            )
        return (
            f"its weight is a torchao {name}, and only int8, intx and float8 weights of linear layers can be adapted; "
            f"leave it out, or {_KNOWN}"
        )
    if kind.__module__.startswith(("torch.ao.nn.quantized", "torch.nn.quantized")):
        return f"it is quantised for inference by PyTorch ({kind.__name__}), without a backward; {_KNOWN}"
    held = next((name for name in _TENSORS if name in module._parameters or name in module._buffers), None)
    if library in _LIBRARIES or held is not None:
        why = f"{library} {kind.__name__}" if library in _LIBRARIES else f"{kind.__name__} has a {held}"
        return f"it is quantised in a format that is not supported ({why}); {_KNOWN}"
    return None
