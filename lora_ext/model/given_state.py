"""Gives a sharded model whole values for the time of a save: those of a ``state_dict`` that the caller gathered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._common.sharded import full_shape, is_elsewhere, is_partitioned
from lora_ext.model.bare_model import adapter_layers
from lora_ext.nn.layer import MERGED_KEY


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
