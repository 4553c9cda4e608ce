"""The state of a model's adapters alone, for checkpoints without the base model, and what an adapted model loads.

Transformers' ``Trainer`` resumes and restores its best model by ``load_state_dict(file, strict=False)``. A state of
adapters alone has :data:`MARKER`, and under every key of the base model a tensor that fits no parameter, once more with
PEFT's prefix: an adapted model takes the adapters, every other model fails to load it. What a method of
lora_ext.methods trains is saved and loaded in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.printable import first_of, shown
from lora_ext._common.sharded import whole
from lora_ext._common.warnings import warn_user
from lora_ext._common.wrapped import KEY_PREFIX, plain_path
from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.bare_model import BareModel, adapter_layers
from lora_ext.model.method_files import MethodFiles

MARKER = (
    "this file holds what was trained: load the base model, then call lora_ext.load_adapter(model, directory), or "
    "lora_ext.methods.load_method if a method was applied"
)
"""A key that loaders print among the unexpected ones."""

_MISFIT = (1,) * 7  # no layer of PyTorch has a parameter with seven dimensions
_GUARD = "_lora_state_guard"


def adapter_state(module: nn.Module, method: MethodFiles | None, also: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """Returns copies on the CPU of all tensors in ``module`` that training may change, by the keys of ``state_dict``.

    These are the adapters' tensors, trained biases if they are in use, those of ``method``, buffers, parameters that
    require gradients, and ``also``. Tensors that several modules share are there once. All ranks that share a DTensor
    must call it.
    """
    wanted = trained_ids(module, method) | {id(tensor) for tensor in (*module.buffers(), *also)}
    state = {MARKER: torch.zeros(1, dtype=torch.uint8)}
    for key in _base_keys(module):  # with strict=False a PeftModel ignores keys without its prefix
        state |= {wrong: torch.zeros(_MISFIT, dtype=torch.uint8) for wrong in (key, f"{KEY_PREFIX}{key}")}
    for key, tensor in module.state_dict(keep_vars=True).items():
        # A quantised layer's state has more than tensors.
        if isinstance(tensor, Tensor) and (tensor.requires_grad or id(tensor) in wanted):
            wanted.discard(id(tensor))
            state[key] = whole(tensor).detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return state


def warn_of_lost_parameters(
    caller: str, module: nn.Module, method: MethodFiles | None = None, *, saved: Iterable[Tensor] = ()
) -> None:
    """Warns of parameters that require gradients and that no adapter, nor ``method``, nor ``saved`` holds."""
    kept = trained_ids(module, method) | {id(tensor) for tensor in saved}
    lost = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in kept]
    if not lost:
        return
    if method is None:
        owner, loader = "belongs to no adapter", "load_adapter"
        remedy = (
            "name its module in modules_to_save, call save_adapter(..., save_embedding_layers=True) for an embedding "
            "or head, or lora_ext.methods.save_method if a method trains it"
        )
    else:
        owner, loader = f"does not belong to {method.name}", "load_method"
        remedy = "freeze it, or save it yourself"
    warn_user(
        f"{caller}: {shown(lost[0])} requires a gradient but {owner} (one of {len(lost)} parameters): {loader} will "
        f"not restore it; {remedy}"
    )


def trained_ids(module: nn.Module, method: MethodFiles | None) -> set[int]:
    """Returns the ids of the tensors of adapters, of trained biases in use and of the method."""
    tensors = [
        tensor
        for _, layer in adapter_layers(module)
        for tensor in (*layer.adapters.parameters(), *layer.adapters.buffers())
    ]
    adapters = adapter_set(module)
    for biases in () if adapters is None else adapters.biases.values():
        tensors += biases.parameters() if biases.used else ()
    tensors += () if method is None else method.tensors.values()
    return {id(tensor) for tensor in tensors}


def _base_keys(module: nn.Module) -> Iterator[str]:
    """Yields the keys of the base model's parameters in its ``state_dict``."""
    for path, held in {"": module, **BareModel(module).modules}.items():
        for name, parameter in held._parameters.items():
            if parameter is not None:
                yield f"{path}.{name}" if path else name


def _check(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuses what ``strict=False`` would leave out without a word. Takes misfits out of the state."""
    for key in [key for key, value in state_dict.items() if getattr(value, "shape", None) == _MISFIT]:
        del state_dict[key]
    if prefix + MARKER in state_dict:
        _check_trained(module, state_dict, prefix)
    keys = {plain_path(key) for key, _ in module.named_parameters(remove_duplicate=False)}
    if of_base := [prefix + key for key in _base_keys(module) if key not in keys and prefix + key in state_dict]:
        raise RuntimeError(
            f"load_state_dict: the state has {shown(of_base[0])}, the base model's key of a layer that has adapters "
            f"here (one of {len(of_base)}); it is the state of a merged model or of one without adapters: load it "
            "before inject, or call unmerge before Trainer or save_pretrained saves the model"
        )


def _check_trained(module: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Checks that a state of adapters alone is of the adapters and the method of ``module``, or raises RuntimeError."""
    tensors = module.state_dict(keep_vars=True)
    # By id, because tensors that modules share are in the state once.
    given = {id(tensor) for key, tensor in tensors.items() if prefix + key in state_dict}
    wanted = trained_ids(module, MethodFiles.of(module)) - given
    lacking = [key for key, tensor in tensors.items() if id(tensor) in wanted]
    inside = (key.removeprefix(prefix) for key in state_dict if key.startswith(prefix))
    foreign = [key for key in inside if key not in tensors and key != MARKER]
    if lacking or foreign:
        raise RuntimeError(
            "load_state_dict: the state holds what was trained of a model with other adapters or another method: it "
            f"lacks {first_of(lacking) or 'nothing'}, and has in addition {first_of(foreign) or 'nothing'}; inject the "
            "same adapters, or apply the same method, before"
        )


def _complete(module: nn.Module, incompatible: Any) -> None:
    """Takes the base model's keys out of the missing ones, after a state of adapters alone was loaded."""
    marker = next((key for key in incompatible.unexpected_keys if key.endswith(MARKER)), None)
    if marker is not None:
        prefix = marker.removesuffix(MARKER)
        for keys in incompatible.missing_keys, incompatible.unexpected_keys:
            keys[:] = [key for key in keys if not key.startswith(prefix)]


def guard_loading(root: nn.Module) -> None:
    """Checks what the adapted model ``root`` is about to load, and takes states of adapters alone, from now on."""
    if _GUARD not in vars(root):
        vars(root)[_GUARD] = (
            root.register_load_state_dict_pre_hook(_check),
            root.register_load_state_dict_post_hook(_complete),
        )


def forget_guard(root: nn.Module) -> None:
    """Undoes :func:`guard_loading`."""
    for hook in vars(root).pop(_GUARD, ()):
        hook.remove()
