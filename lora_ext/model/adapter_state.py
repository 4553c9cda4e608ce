"""The state of a model's adapters alone, for checkpoints that leave out the base model.

Transformers' ``Trainer`` resumes and restores its best model by ``load_state_dict(file, strict=False)`` of a file that
``from_pretrained`` reads, too. So a state of adapters alone has one of :data:`MARKERS`, and under every key of the base
model a tensor that fits no parameter, once more with PEFT's prefix: an adapted model takes the adapters, every other
model fails to load it. What a method of lora_ext.methods trains is saved and loaded in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._common.wrapped import KEY_PREFIX, plain_path, state_path
from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.bare_model import BareModel, adapter_layers
from lora_ext.model.method_files import MethodFiles
from lora_ext.model.peft_keys import has_peft_keys, translate_peft_keys
from lora_ext.nn import LoraLayer
from lora_ext.nn.merged_state import check_same_merged
from lora_ext.nn.state_form import own_keys
from lora_ext.quantized import quantized_weight

MARKER = "this file holds adapters only: load the base model, then call lora_ext.load_adapter(model, directory)"
"""A key that loaders print among the unexpected ones."""

METHOD_MARKER = (
    "this file holds what a method trained: load the base model, then call lora_ext.methods.load_method(model, "
    "directory)"
)
"""The key in states with a method's tensors."""

MARKERS = (MARKER, METHOD_MARKER)

_MISFIT = (1,) * 7  # no layer of PyTorch has a parameter with seven dimensions


def adapter_state(
    module: nn.Module, adapters: AdapterSet | None, method: MethodFiles | None = None
) -> dict[str, Tensor]:
    """Returns copies on the CPU of all tensors in ``module`` that training may change, by the keys of ``state_dict``.

    These are the adapters' tensors, trained biases if they are in use, those of ``method``, buffers, and parameters
    that require gradients. Tensors that several modules share are there once.
    """
    state = {}
    seen: set[int] = set()
    is_adapters, buffers = _is_adapters(module, adapters, method), {id(buffer) for buffer in module.buffers()}
    for key, tensor in own_state(module).items():
        if not isinstance(tensor, Tensor):  # the state of a quantised layer, for example
            continue
        changes = is_adapters(key, tensor) or tensor.requires_grad or id(tensor) in buffers
        if changes and id(tensor) not in seen:
            seen.add(id(tensor))
            state[plain_path(key)] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    base = _base_keys(module)
    wanted = [*base, *(f"{KEY_PREFIX}{key}" for key in base)]  # with strict=False a PeftModel ignores other keys
    misfits = {key: torch.zeros(_MISFIT, dtype=torch.uint8) for key in wanted if key not in state}
    marker = MARKER if method is None else METHOD_MARKER
    return {marker: torch.zeros(1, dtype=torch.uint8)} | misfits | state


def lost_parameters(
    module: nn.Module, adapters: AdapterSet | None, method: MethodFiles | None = None, *, saved: Iterable[Tensor] = ()
) -> list[str]:
    """Names the parameters that require gradients and belong to no adapter, nor to ``method``, except ``saved`` ones.

    Files of adapters and methods do not hold them.
    """
    is_adapters, kept = _is_adapters(module, adapters, method), {id(tensor) for tensor in saved}
    named = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
    return [name for name, parameter in named if not is_adapters(name, parameter) and id(parameter) not in kept]


def _is_misfit(value: Any) -> bool:
    return getattr(value, "shape", None) == _MISFIT


def _base_keys(module: nn.Module) -> list[str]:
    """The keys of the base model's parameters in its ``state_dict``."""
    base = {"": module, **BareModel(module).modules}
    return [
        f"{path}.{name}" if path else name
        for path, held in base.items()
        for name, parameter in held._parameters.items()
        if parameter is not None
    ]


def own_state(module: nn.Module) -> dict[str, Tensor]:
    """The live tensors of ``module`` by the keys of its ``state_dict``."""
    with own_keys():
        return type(module).state_dict(module, keep_vars=True)


def _is_adapters(
    module: nn.Module, adapters: AdapterSet | None, method: MethodFiles | None
) -> Callable[[str, Tensor], bool]:
    """Returns a function that says whether a tensor of :func:`own_state` is an adapter's or the method's."""
    paths = (plain_path(path) for path, _ in adapter_layers(module))
    inside = tuple(f"{path}.adapters." if path else "adapters." for path in paths)
    biases = [] if adapters is None else [biases for biases in adapters.biases.values() if biases.used]
    of_method = set() if method is None else {id(tensor) for tensor in method.tensors.values()}
    return lambda key, tensor: (
        plain_path(key).startswith(inside) or id(tensor) in of_method or any(trained.owns(tensor) for trained in biases)
    )


class StateGuard:
    """A hook before ``load_state_dict``: checks what is merged before any change, and takes states of other forms.

    They are states of adapters alone, and of the same model with PEFT's layers.

    Attributes:
        adapters: the adapters of the model, or None; copied and pickled with it.
        has_method: whether a method (lora_ext.methods) inserted modules.
    """

    adapters: AdapterSet | None = None
    has_method = False

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if any(prefix + marker in state_dict for marker in MARKERS):
            self._complete(module, state_dict, prefix)
        elif self.adapters is not None and has_peft_keys(state_dict, prefix):
            translate_peft_keys(module, self.adapters, own_state(module), state_dict, prefix)
        if any(_is_misfit(value) for key, value in state_dict.items() if key.startswith(prefix)):
            raise RuntimeError(
                "load_state_dict: the state holds the adapters of a model without the wrapper around this "
                f"{type(module).__name__}; load it into the model inside, or call lora_ext.load_adapter"
            )
        _check_not_of_base(module, state_dict, prefix)
        for path, layer in adapter_layers(module):
            if isinstance(layer, LoraLayer):
                check_same_merged(layer, state_dict, f"{prefix}{state_path(path)}." if path else prefix)

    def _complete(self, module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Completes a state of adapters alone by the tensors of ``module``, so that loading leaves them as they are."""
        method, tensors = MethodFiles.of(module), own_state(module)
        is_adapters = _is_adapters(module, self.adapters, method)
        misfits = {key for key, value in state_dict.items() if _is_misfit(value)}
        # By the id of the parameter, because shared tensors are in the state once.
        given = {
            id(tensor): state_dict[prefix + plain_path(key)]
            for key, tensor in tensors.items()
            if prefix + plain_path(key) in state_dict and prefix + plain_path(key) not in misfits
        }
        _check_same_method(module, method, prefix + METHOD_MARKER in state_dict, given)
        plain = (prefix + plain_path(key) for key in tensors if plain_path(key) != key)
        for key in (*(prefix + marker for marker in MARKERS), *misfits, *plain):
            state_dict.pop(key, None)
        quantized = [state_path(path) for path, layer in module.named_modules() if quantized_weight(layer) is not None]
        of_quantized = tuple(f"{path}." for path in quantized)
        for key, tensor in tensors.items():
            if id(tensor) in given:
                state_dict[prefix + key] = given[id(tensor)]
            elif key.startswith(of_quantized) and not key.endswith((".weight", ".bias")):
                continue  # scales of bitsandbytes: no parameters, which it refuses to load or calls unexpected
            elif not is_adapters(key, tensor):
                state_dict[prefix + key] = tensor


def _check_not_of_base(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Checks that no adapted layer has its values under the base model's key, where they would not be found.

    That is how a merged model is saved, and a model without adapters. Partial states have the keys of ``module``.

    RuntimeError: one has.
    """
    keys = {plain_path(key) for key, _ in module.named_parameters(remove_duplicate=False)}
    if strange := [key for key in _base_keys(module) if prefix + key in state_dict and key not in keys]:
        raise RuntimeError(
            f"load_state_dict: the state has {shown(prefix + strange[0])}, the base model's key of a layer that has "
            f"adapters here (one of {len(strange)}); it is the state of a merged model or of one without adapters: "
            "load it before inject, or call unmerge before Trainer or save_pretrained saves the model"
        )


def _check_same_method(module: nn.Module, method: MethodFiles | None, in_state: bool, given: dict[int, Tensor]) -> None:
    """Checks that a state has the tensors of ``method``, or of none. RuntimeError: it has not.

    Args:
        in_state: whether the state has tensors of a method.
        given: the values in the state, by the id of the model's tensor.
    """
    held = {} if method is None else method.tensors
    lacks = [path for path, tensor in held.items() if id(tensor) not in given]
    if in_state == (method is not None) and not lacks:
        return
    applied = "no method was applied to it" if method is None else f"the method {method.name} was applied to it"
    saved = "of a method" if in_state else "of adapters without a method"
    missing = f", whose {shown(lacks[0])} the state lacks" if lacks else ""
    raise RuntimeError(
        f"load_state_dict: the state is {saved}, but {type(module).__name__} does not fit: {applied}{missing}; apply "
        "the method of the saved model (lora_ext.methods.apply_method) before"
    )


def guard_loading(module: nn.Module, *, adapters: AdapterSet | None = None, has_method: bool = False) -> None:
    """Gives ``module`` a :class:`StateGuard`, once, because of adapters or of a method's modules."""
    guards = _guards(module)
    if not guards:
        module.register_load_state_dict_pre_hook(StateGuard())
        guards = _guards(module)
    for guard in guards.values():
        if adapters is not None:
            guard.adapters = adapters
        guard.has_method |= has_method


def forget_guard(module: nn.Module, *, adapters: bool = False, method: bool = False) -> None:
    """Undoes :func:`guard_loading` for adapters, or for a method."""
    for key, guard in _guards(module).items():
        if adapters:
            guard.adapters = None
        if method:
            guard.has_method = False
        if guard.adapters is None and not guard.has_method:
            del module._load_state_dict_pre_hooks[key]


def _guards(module: nn.Module) -> dict[int, StateGuard]:
    # PyTorch wraps hooks, and the handle of a hook is lost in copies.
    hooks = {key: getattr(hook, "hook", hook) for key, hook in module._load_state_dict_pre_hooks.items()}
    return {key: hook for key, hook in hooks.items() if isinstance(hook, StateGuard)}
