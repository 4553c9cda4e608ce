"""The state of a model's adapters alone, for checkpoints without the base model, and what an adapted model loads.

Transformers' ``Trainer`` resumes and restores its best model by ``load_state_dict(file, strict=False)``, and reports
missing and unexpected keys. A state of adapters alone has :data:`MARKER`: an adapted model does not miss the base
model's keys. What a method of lora_ext.methods trains is saved and loaded in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._common.sharded import whole
from lora_ext._common.warnings import warn_user
from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.bare_model import adapter_layers
from lora_ext.model.method_files import MethodFiles

MARKER = (
    "this file holds what was trained: load the base model, then call lora_ext.load_adapter(model, directory), or "
    "lora_ext.methods.load_method if a method was applied"
)
"""A key that loaders print among the unexpected ones."""

_GUARD = "_lora_state_guard"  # the attribute that holds the hook


def adapter_state(module: nn.Module, method: MethodFiles | None, also: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """Returns copies on the CPU of all tensors in ``module`` that training may change, by the keys of ``state_dict``.

    These are the adapters' tensors, trained biases if they are in use, those of ``method``, buffers, parameters that
    require gradients, and ``also``. Tensors that several modules share are there once. All ranks that share a DTensor
    must call it.
    """
    wanted = trained_ids(module, method) | {id(tensor) for tensor in (*module.buffers(), *also)}
    state = {MARKER: torch.zeros(1, dtype=torch.uint8)}
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
    owner, loader = ("no adapter", "load_adapter") if method is None else (f"no part of {method.name}", "load_method")
    warn_user(
        f"{caller}: {shown(lost[0])} requires a gradient but belongs to {owner} (one of {len(lost)} parameters): "
        f"{loader} will not restore it; freeze it, save it yourself, name its module in modules_to_save, or call "
        "save_adapter(..., save_embedding_layers=True) for an embedding or head, save_method if a method trains it"
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


def guard_loading(root: nn.Module) -> None:
    """Makes the adapted model ``root`` take states of adapters alone, from now on."""
    if _GUARD not in vars(root):
        vars(root)[_GUARD] = root.register_load_state_dict_post_hook(_complete)


def forget_guard(root: nn.Module) -> None:
    """Undoes :func:`guard_loading`."""
    if (hook := vars(root).pop(_GUARD, None)) is not None:
        hook.remove()


def _complete(module: nn.Module, incompatible: Any) -> None:
    """Leaves only what training may change among the missing keys, after a state of adapters alone was loaded."""
    marker = next((key for key in incompatible.unexpected_keys if key.endswith(MARKER)), None)
    if marker is None:
        return
    incompatible.unexpected_keys.remove(marker)
    prefix, missing = marker.removesuffix(MARKER), {*incompatible.missing_keys}
    tensors = {prefix + key: tensor for key, tensor in module.state_dict(keep_vars=True).items()}
    # By id, because tensors that modules share are in the state once.
    given = {id(tensor) for key, tensor in tensors.items() if key not in missing}
    wanted = trained_ids(module, MethodFiles.of(module)) - given
    incompatible.missing_keys[:] = [
        key for key in incompatible.missing_keys if not key.startswith(prefix) or id(tensors.get(key)) in wanted
    ]
