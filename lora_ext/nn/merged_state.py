"""Keeps in the ``state_dict`` which adapters are merged, so that no update is counted twice or lost.

A merged layer adds one small tensor to its state, the names of its merged adapters; a layer with nothing merged adds
nothing, and its keys are exactly those of its parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lora_ext.nn.layer import LoraLayer

MERGED_KEY = "_extra_state"
"""PyTorch's name for state that is not a parameter; its tools (torch.distributed.checkpoint) know it."""


def encode_names(names: tuple[str, ...]) -> Tensor:
    """Encodes adapter names, which contain no dots, as a tensor, because safetensors files hold nothing else."""
    return torch.tensor(list(".".join(names).encode("utf-8", "surrogatepass")), dtype=torch.uint8)


def decode_names(state: Any) -> tuple[str, ...]:
    """Inverts :func:`encode_names`; None gives no names. ValueError: it is something else."""
    if state is None:
        return ()
    if not isinstance(state, Tensor) or state.dim() != 1:
        raise ValueError("want a tensor with one dimension")
    values = state.detach().to("cpu", torch.uint8)  # users convert the dtype of a whole state
    return tuple(bytes(values.tolist()).decode("utf-8", "surrogatepass").split("."))


def check_same_merged(layer: LoraLayer, state: Mapping[str, Any], prefix: str) -> None:
    """Checks that ``state`` has the weights of ``layer`` with the same adapters merged as the layer has now.

    A state without the layer's base weights is not restricted. If adapters are merged on both sides, the weights must
    be the same, because the record that unmerges them is not in the state.

    Args:
        prefix: of the layer's keys in ``state``.

    Raises:
        RuntimeError: something else is merged (the message has the remedy), or the names are damaged.
    """
    try:
        in_state = decode_names(state.get(prefix + MERGED_KEY))
    except ValueError as error:
        raise RuntimeError(f"load_state_dict: {prefix}{MERGED_KEY} holds no names of adapters ({error})") from error
    here = layer.merged_adapters
    if not in_state and not here:
        return
    weights = {prefix + path: tensor for path, tensor in layer.merged_into().items() if prefix + path in state}
    if not weights:
        return
    where = repr(prefix.removesuffix(".") or type(layer).__name__)
    if in_state == here:
        if all(_same(state[key], tensor) for key, tensor in weights.items()):
            return
        problem = f"{list(here)} in the state and in the model, but with other values; unmerge both before"
    elif here:
        problem = f"{list(here)} in the model, {list(in_state) or 'nothing'} in the state; call unmerge(model) before"
    else:
        problem = (
            f"{list(in_state)} in the state, nothing in the model, where the update would count twice; call unmerge on "
            "the saved model before"
        )
    raise RuntimeError(f"load_state_dict: merged into {where}: {problem} taking or loading a state_dict")


def _same(saved: Tensor, tensor: Tensor) -> bool:
    if saved is tensor:
        return True
    if saved.is_meta or tensor.is_meta or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
        return False
    if hasattr(tensor, "__tensor_flatten__"):  # torchao's weights
        names = tensor.__tensor_flatten__()[0]
        same_parts = type(saved) is type(tensor) and saved.__tensor_flatten__()[0] == names
        return same_parts and all(_same(getattr(saved, name), getattr(tensor, name)) for name in names)
    saved, tensor = saved.detach().to(tensor.device), tensor.detach()
    if tensor.element_size() == 1:  # PyTorch does not compare float8
        saved, tensor = saved.view(torch.uint8), tensor.view(torch.uint8)
    return torch.equal(saved, tensor)
