"""The state of a model's adapters alone, for checkpoints that leave out the base model.

Transformers' ``Trainer`` resumes and restores its best model by ``load_state_dict(file, strict=False)`` of a file that
``from_pretrained`` reads, too. So a state of adapters alone has :data:`MARKER`, and under every key of the base model a
tensor that fits no parameter: an injected model takes the adapters, every other model fails to load it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.bare_model import BareModel, adapter_layers
from lora_ext.model.peft_keys import has_peft_keys, translate_peft_keys
from lora_ext.nn import LoraLayer
from lora_ext.nn.merged_state import check_same_merged
from lora_ext.nn.state_form import own_keys
from lora_ext.quantized import quantized_weight

MARKER = "this file holds adapters only: load the base model, then call lora_ext.load_adapter(model, directory)"
"""A key that loaders print among the unexpected ones."""

_MISFIT = (1,) * 7  # no layer of PyTorch has a parameter with seven dimensions


def adapter_state(module: nn.Module, adapters: AdapterSet) -> dict[str, Tensor]:
    """Returns copies on the CPU of all tensors in ``module`` that training may change, by the keys of ``state_dict``.

    These are the adapters' tensors, trained biases if they are in use, buffers, and parameters that require gradients.
    Tensors that several modules share are there once.
    """
    state = {}
    seen: set[int] = set()
    is_adapters, buffers = _is_adapters(module, adapters), {id(buffer) for buffer in module.buffers()}
    for key, tensor in own_state(module).items():
        if not isinstance(tensor, Tensor):  # the state of a quantised layer, for example
            continue
        changes = is_adapters(key, tensor) or tensor.requires_grad or id(tensor) in buffers
        if changes and id(tensor) not in seen:
            seen.add(id(tensor))
            state[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    base = {"": module, **BareModel(module).modules}
    keys = [f"{path}.{name}" if path else name for path, held in base.items() for name in held._parameters]
    misfits = {key: torch.zeros(_MISFIT, dtype=torch.uint8) for key in keys if key not in state}
    return {MARKER: torch.zeros(1, dtype=torch.uint8)} | misfits | state


def lost_parameters(module: nn.Module, adapters: AdapterSet, *, saved: Iterable[Tensor] = ()) -> list[str]:
    """Names the parameters that require gradients and belong to no adapter, except those in ``saved``.

    Adapter files do not hold them.
    """
    is_adapters, kept = _is_adapters(module, adapters), {id(tensor) for tensor in saved}
    named = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    return [name for name, parameter in named if not is_adapters(name, parameter) and id(parameter) not in kept]


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors of ``module`` by the keys of its ``state_dict``."""
    with own_keys():
        return type(module).state_dict(module, keep_vars=True)


def _is_adapters(module: nn.Module, adapters: AdapterSet) -> Callable[[str, Tensor], bool]:
    """Returns a function that says whether a tensor of :func:`own_state` is an adapter's."""
    inside = tuple(f"{path}.adapters." if path else "adapters." for path, _ in adapter_layers(module))
    biases = [biases for biases in adapters.biases.values() if biases.used]
    return lambda key, tensor: key.startswith(inside) or any(trained.owns(tensor) for trained in biases)


class StateGuard:
    """A hook before ``load_state_dict``: checks what is merged before any change, and takes states of other forms.

    They are states of adapters alone, and of the same model with PEFT's layers.

    Args:
        adapters: the adapters of the model; copied and pickled with it.
    """

    def __init__(self, adapters: AdapterSet) -> None:
        self.adapters = adapters

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + MARKER in state_dict:
            self._complete(module, state_dict, prefix)
        elif has_peft_keys(state_dict, prefix):
            translate_peft_keys(module, self.adapters, own_state(module), state_dict, prefix)
        for path, layer in adapter_layers(module):
            if isinstance(layer, LoraLayer):
                check_same_merged(layer, state_dict, f"{prefix}{path}." if path else prefix)

    def _complete(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Completes a state of adapters alone by the tensors of ``module``, so that loading leaves them as they are."""
        is_adapters = _is_adapters(module, self.adapters)
        misfits = [key for key, value in state_dict.items() if getattr(value, "shape", None) == _MISFIT]
        for key in (prefix + MARKER, *misfits):
            del state_dict[key]
        own = own_state(module)
        # By the id of the parameter, because shared tensors are in the state once.
        given = {id(tensor): state_dict[prefix + key] for key, tensor in own.items() if prefix + key in state_dict}
        quantized = [path for path, layer in module.named_modules() if quantized_weight(layer) is not None]
        of_quantized = tuple(f"{path}." for path in quantized)
        for key, tensor in own.items():
            if id(tensor) in given:
                state_dict[prefix + key] = given[id(tensor)]
            elif key.startswith(of_quantized) and not key.endswith((".weight", ".bias")):
                continue  # scales of bitsandbytes: no parameters, which it refuses to load or calls unexpected
            elif not is_adapters(key, tensor):
                state_dict[prefix + key] = tensor


def guard_loading(module: nn.Module, adapters: AdapterSet) -> None:
    """Gives ``module`` a :class:`StateGuard`, once."""
    if not _guards(module):
        module.register_load_state_dict_pre_hook(StateGuard(adapters))


def forget_guard(module: nn.Module) -> None:
    """Undoes :func:`guard_loading`."""
    for key in _guards(module):
        del module._load_state_dict_pre_hooks[key]


def _guards(module: nn.Module) -> list[int]:
    # PyTorch wraps hooks, and the handle of a hook is lost in copies.
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if isinstance(getattr(hook, "hook", hook), StateGuard)]
