"""Decides what a layer may assume about its base layer, and when it has to call it.

A layer computes a product in place of its base layer only if a call would compute exactly that product and nothing else
would see the call (:func:`plain_linear`). Otherwise it calls the base layer and adds its updates to a copy of the
result (:func:`own_copy`), so that hooks, replaced forwards and modules put in the base layer's place keep their effect.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from lora_ext._ops.checks import FLOATING
from lora_ext.quantized import quantized_weight, why_unsupported

_LINEAR_FORWARD = nn.Linear.forward  # PyTorch's: a library that replaces it in the class is noticed too
_DENSE = (nn.Parameter, Tensor)


def runs_alone(module: nn.Module) -> bool:
    """Returns whether a call of ``module`` runs the forward of its class and nothing else."""
    state = module.__dict__  # nn.Module's attribute lookup takes ten times as long
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or _global_forward_hooks
        or _global_forward_pre_hooks
        or _global_backward_hooks
        or _global_backward_pre_hooks
        or "forward" in state
        or type(module).__call__ is not nn.Module.__call__  # replaced in nn.Module itself while torch.export traces
    )


def has_hooks(module: nn.Module) -> bool:
    """Returns whether hooks of ``module`` itself, not of all modules, would see its calls."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def plain_linear(base: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Returns weight ``[out_features, in_features]`` and bias of a base layer that is exactly their product, or None.

    Takes 0.4 us. Parametrized, pruned and sharded weights are no entries of ``_parameters``, or not dense.
    """
    parameters = base.__dict__["_parameters"]
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if (
        not (type(weight) in _DENSE or is_dense(weight))
        or not (bias is None or type(bias) in _DENSE or is_dense(bias))
        or not runs_alone(base)
    ):
        return None
    kind = type(base)
    if kind is nn.Linear or isinstance(base, nn.Linear):
        if kind.forward is not _LINEAR_FORWARD or (bias is None and "bias" not in parameters):
            return None
        return weight, bias
    return (weight.T, bias) if is_conv1d(base) else None


# By the classes of a layer and of its weight; None: the format is not known.
_QUANTIZED_FORWARDS: dict[tuple[type, type], object] = {}


def runs_quantized_product(base: nn.Module) -> bool:
    """Returns whether a call of ``base`` is the product with a quantised weight of a known format, plus the bias."""
    kind = type(base)
    key = kind, type(base.__dict__["_parameters"].get("weight"))
    if key not in _QUANTIZED_FORWARDS:
        weight = quantized_weight(base)
        _QUANTIZED_FORWARDS[key] = None if weight is None else weight.plain_forward.forward
    return _QUANTIZED_FORWARDS[key] is kind.forward and runs_alone(base)


def is_dense(tensor: object) -> bool:
    """Returns whether ``tensor`` is a tensor of PyTorch's own class, or stands for one while a graph is traced."""
    kind = type(tensor)
    return kind in _DENSE or kind.__module__.startswith("torch._subclasses.")


def tensor_of(layer: nn.Module, y: Any) -> Tensor:
    """Returns the base layer's output, which takes an update. TypeError: it is no tensor."""
    if not isinstance(y, Tensor):
        raise TypeError(f"{type(layer).__name__}: base_layer returned a {type(y).__name__}, want a tensor")
    return y


def own_copy(layer: nn.Module, y: Any) -> Tensor:
    """Returns a contiguous copy of the base layer's output, which others may hold, for in-place updates."""
    return tensor_of(layer, y).clone(memory_format=torch.contiguous_format)


def is_conv1d(module: nn.Module) -> bool:
    """Returns whether ``module`` is Transformers' ``Conv1D``, a linear layer that stores its weight transposed."""
    kind = type(module)  # by name: Transformers may not be installed
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


# --- what inject and merge refuse -------------------------------------------------------------------------------------

_OTHER_OUTPUTS = {
    "Llama4Router": "a tuple",
    "PhimoeTopKRouter": "a tuple",
    "DeepseekV4GroupedLinear": "a part of the features for each group",
}
"""What the forward of these linear layers returns, which takes no update."""

_MAMBA = ("MambaMixer", "FalconMambaMixer", "JambaMambaMixer")
_MAMBA2 = ("Mamba2Mixer", "Zamba2MambaMixer", "BambaMixer", "FalconH1Mixer", "NemotronHMamba2Mixer")
_MAMBA2 += ("GraniteMoeHybridMambaLayer",)
_ATTENTION_MAPS = ("DetrMHAttentionMap", "ConditionalDetrMHAttentionMap", "MaskFormerDetrMHAttentionMap")
_READ = {
    "dt_proj": _MAMBA,
    "conv1d": (*_MAMBA, *_MAMBA2),
    "dense": ("MobileBertLMPredictionHead",),
    "k_proj": ("WavLMAttention", *_ATTENTION_MAPS),
    **dict.fromkeys(("q_proj", "v_proj", "out_proj"), ("WavLMAttention",)),
}
"""Child modules whose weight a model of Transformers reads without calling them, and the classes that do so."""

_READ_BY_KERNELS = {"x_proj": _MAMBA, "out_proj": (*_MAMBA, *_MAMBA2)}
"""The same where Mamba's kernels may run, which take weights."""


def why_bypassed(reader: nn.Module, name: str) -> str | None:
    """Returns why an adapter of the child ``name`` of ``reader`` would have no effect, or None if that is not known."""
    kind = type(reader).__name__
    if kind in _READ.get(name, ()):
        return f"{kind} reads its weight without calling it, so that an adapter would have no effect; leave it out"
    if kind in _READ_BY_KERNELS.get(name, ()) and _may_run_mamba_kernels():
        return (
            f"{kind} passes its weight to kernels without calling it, so that an adapter would have no effect; leave "
            "it out, or do without them: set USE_HUB_KERNELS=0 before the model is loaded, and uninstall mamba_ssm"
        )
    return None


def _may_run_mamba_kernels() -> bool:
    """Returns whether a package of Mamba's kernels may be used: they run on such devices only.

    Transformers takes them from ``kernels`` by itself since 5.25, which installs it, unless the environment says no.
    """
    packages = ["mamba_ssm"]
    if os.environ.get("USE_HUB_KERNELS", "1").upper() in ("1", "ON", "YES", "TRUE"):
        packages.append("kernels")
    has_device = torch.cuda.is_available() or torch.xpu.is_available()
    return has_device and any(importlib.util.find_spec(name) is not None for name in packages)


def why_weight_unusable(module: nn.Module, name: str = "weight", *, reads_values: bool = False) -> str | None:
    """Returns why no update of the parameter ``name`` of ``module`` can be computed, or None.

    ``reads_values``: the layer reads its values, so that they must not be offloaded.
    """
    weight = module._parameters.get(name)
    if weight is None:
        return f"its {name} is computed by a parametrization; remove that first"
    if torch.nn.parameter.is_lazy(weight):
        return f"its {name} is not initialised yet; run the model once first"
    if (reason := why_unsupported(module)) is not None:
        return reason
    if not _behaves_as_dense(weight):
        kind = type(weight)
        if kind.__name__ == "DTensor":
            return f"its {name} is sharded (DTensor); inject before you shard the model"
        return f"its {name} is a {kind.__module__.partition('.')[0]} {kind.__name__}, not a plain tensor"
    if weight.dtype not in FLOATING:
        return f"its {name} is {weight.dtype}, want one of {', '.join(map(str, FLOATING))}"
    if reads_values and is_offloaded(module, name):
        return f"its {name} is offloaded; keep this module on a device (device_map)"
    return None


def _behaves_as_dense(tensor: Tensor) -> bool:
    kind = type(tensor)
    return is_dense(tensor) or (
        kind.__torch_function__ is nn.Parameter.__torch_function__
        and kind.__torch_dispatch__ is nn.Parameter.__torch_dispatch__
    )


def why_output_unusable(module: nn.Module) -> str | None:
    """Returns why the output of a linear layer takes no update, or None. Other classes are called and checked then."""
    returned = _OTHER_OUTPUTS.get(type(module).__name__)
    if returned is None:
        return None
    return f"its forward returns {returned}, want a tensor [..., out_features]; name its weight in target_parameters"


def has_forward_of(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Returns whether ``module`` has the forward (and ``methods``) of ``kind``, neither overridden nor replaced.

    Accelerate replaces it to move tensors between devices; what it replaced is then checked.
    """
    hooks = _accelerate_hooks(module)
    of_accelerate = hooks and all(type(hook).__module__ == "accelerate.hooks" for hook in hooks)
    for method in ("forward", *methods):
        wanted, patched = getattr(kind, method), vars(module).get(method)
        if getattr(type(module), method) is not wanted:
            return False
        if patched is not None and not splits_tensors(patched):
            below = vars(module)["_old_forward"] if of_accelerate and method == "forward" else patched
            if getattr(below, "__func__", None) is not wanted:
                return False
    return True


def why_not_merge(base: nn.Module, *kinds: type[nn.Module], methods: tuple[str, ...] = ()) -> str | None:
    """Returns why merging into ``base``'s weight could differ from adding to its output, or None.

    ``kinds``: the classes whose forward is linear in the weight.
    """
    own = type(base)
    is_falcon = own.__name__ == "FalconLinear" and nn.Linear in kinds  # its own forward is nn.Linear's product
    kind = own if is_conv1d(base) or is_falcon else next((kind for kind in kinds if isinstance(base, kind)), None)
    if kind is None:
        return f"base_layer is a {own.__module__}.{own.__name__}; merge or unload it first"
    hooks = (*base._forward_hooks.values(), *base._forward_pre_hooks.values())
    if not all(_gathers(hook) or splits_tensors(hook) for hook in hooks):
        return "its hooks may change what it computes; remove them first"
    if not has_forward_of(base, kind, *methods):
        return f"the forward of {own.__name__} is not {kind.__name__}'s, and may not be linear in the weight"
    return None


def _gathers(hook: object) -> bool:
    """Returns whether a hook is FSDP2's, which gathers parameters for a call."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp.")


def splits_tensors(function: object) -> bool:
    """Returns whether a hook or forward only moves x and y between devices, for tensor parallelism."""
    module = getattr(function, "__module__", None) or ""
    return module.startswith(("torch.distributed.tensor.", "transformers.distributed."))


# --- accelerate -------------------------------------------------------------------------------------------------------


def is_offloaded(module: nn.Module, name: str = "weight") -> bool:
    """Returns whether accelerate keeps the parameter elsewhere, and brings it only for a call of ``module``."""
    weight = module._parameters.get(name)
    return weight is not None and weight.is_meta and "_hf_hook" in vars(module)


def execution_device(module: nn.Module) -> torch.device | None:
    """Returns the device to which accelerate moves ``module``'s parameters for a call; None: they stay in place."""
    if not any(is_offloaded(module, name) for name in module._parameters):
        return None
    devices = [getattr(hook, "execution_device", None) for hook in _accelerate_hooks(module)]
    return next((torch.device(device) for device in devices if device is not None), None)


def _accelerate_hooks(module: nn.Module) -> tuple[object, ...]:
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
