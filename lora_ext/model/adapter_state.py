"""The state of a model's adapters alone, for checkpoints without the base model, and what an adapted model loads.

Transformers' ``Trainer`` resumes and restores its best model by ``load_state_dict(file, strict=False)``, and reports
missing and unexpected keys. A state of adapters alone has :data:`MARKER`: an adapted model does not miss the base
model's keys. What a method of lora_ext.methods trains is saved and loaded in the same way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_ext._common.messages import shown, warn_user
from lora_ext._common.sharded import full_shape, is_elsewhere, is_partitioned, whole
from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.bare_model import adapter_layers
from lora_ext.nn.layer import MERGED_KEY

MARKER = (
    "this file holds what was trained: load the base model, then call lora_ext.load_adapter(model, directory), or "
    "lora_ext.methods.load_method if a method was applied"
)
"""A key that loaders print among the unexpected ones."""

_GUARD = "_lora_state_guard"  # the attribute that holds the hook


@dataclasses.dataclass(frozen=True)
class MethodFiles:
    """The state of an applied method of lora_ext.methods, for code that may not import that package.

    Attributes:
        name: the method's name.
        inserts: whether it inserted modules, which the base model lacks.
        has_adapter: whether the low-rank adapter "default" is a part of it.
        find_tensors: finds the live tensors that it trains or that change, by path in the bare model, except the
            adapter's.
        names: the files of ``write`` and of an adapter, in the order of :func:`~lora_ext.files.writing.write_files`.
        write: writes the method's files, except the adapter's, to a directory.
    """

    name: str
    inserts: bool
    has_adapter: bool
    find_tensors: Callable[[], Mapping[str, Tensor]]
    names: tuple[str, ...]
    write: Callable[[Path], None]

    of: ClassVar[Callable[[nn.Module], MethodFiles | None]] = staticmethod(lambda root: None)
    """Returns the method of a module that neither base model nor adapter files can hold, or None; methods/ sets it."""


def adapter_state(module: nn.Module, method: MethodFiles | None, also: Iterable[Tensor] = ()) -> dict[str, Tensor]:
    """Returns copies on the CPU of all tensors in ``module`` that training may change, by the keys of ``state_dict``.

    These are the adapters' tensors, trained biases if they are active, those of ``method``, buffers, parameters that
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
    """Returns the ids of the tensors of adapters, of active trained biases and of the method."""
    tensors = [
        tensor
        for _, layer in adapter_layers(module)
        for tensor in (*layer.adapters.parameters(), *layer.adapters.buffers())
    ]
    adapters = adapter_set(module)
    for biases in () if adapters is None else adapters.biases.values():
        tensors += biases.parameters() if biases.used else ()
    tensors += () if method is None else method.find_tensors().values()
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


@contextmanager
def with_values(caller: str, module: nn.Module, given: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Gives ``module`` the tensors of the ``state_dict`` that a caller gathered, e.g. from FSDP's shards, and back.

    Of a model that ZeRO-3 partitions, Trainer gathers for PEFT's saving only what trains: base layers become empty.

    ValueError: ``given`` lacks keys of ``module``.
    """
    if given is None:
        yield
        return
    state = module.state_dict(keep_vars=True)
    wanted = {key: tensor for key, tensor in state.items() if not key.endswith(MERGED_KEY)}
    of_adapters = {id(parameter) for _, layer in adapter_layers(module) for parameter in layer.adapters.parameters()}
    given = dict(given) | {
        key: torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta") if is_elsewhere(tensor) else tensor
        for key, tensor in wanted.items()
        if is_partitioned(tensor) and key not in given and id(tensor) not in of_adapters
    }
    if missing := [key for key in wanted if key not in given]:
        raise ValueError(
            f"{caller}: state_dict lacks {len(missing)} keys of model.state_dict(), {shown(missing[0])} for one; pass "
            "all of them, or none; compile in place by model.compile() or TrainingArguments(torch_compile=True), as "
            "torch.compile(model) changes the keys"
        )
    values = {
        id(tensor): nn.Parameter(given[key], tensor.requires_grad) if isinstance(tensor, nn.Parameter) else given[key]
        for key, tensor in wanted.items()
    }
    places = [held for part in module.modules() for held in (part._parameters, part._buffers)]
    before = [dict(held) for held in places]
    try:
        for held in places:
            held.update({name: values[id(tensor)] for name, tensor in held.items() if id(tensor) in values})
        yield
    finally:
        for held, tensors in zip(places, before, strict=True):
            held.update(tensors)
