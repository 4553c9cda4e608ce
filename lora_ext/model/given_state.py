"""Gives a sharded model whole values for the time of a save: those of a ``state_dict`` that the caller gathered."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from lora_ext._common.printable import shown
from lora_ext._common.sharded import full_shape, is_elsewhere, is_partitioned
from lora_ext.model.adapter_state import own_state
from lora_ext.model.bare_model import adapter_layers
from lora_ext.nn.merged_state import MERGED_KEY


@contextmanager
def with_values(
    caller: str, module: nn.Module, given: Mapping[str, Tensor] | None, without: Collection[str] = ()
) -> Iterator[None]:
    """Gives ``module`` the tensors of the ``state_dict`` that a caller gathered, e.g. from FSDP's shards, and back.

    Of a model that ZeRO-3 partitions, Trainer gathers for PEFT's saving only what trains: base layers become empty,
    and so do the adapters ``without``.
    """
    if given is None:
        yield
        return
    wanted = {key: tensor for key, tensor in own_state(module).items() if not key.endswith(MERGED_KEY)}
    needed = (a for _, layer in adapter_layers(module) for name, a in layer.adapters.items() if name not in without)
    of_adapters = {id(parameter) for adapter in needed for parameter in adapter.parameters()}
    given = dict(given) | {
        key: torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta") if is_elsewhere(tensor) else tensor
        for key, tensor in wanted.items()
        if is_partitioned(tensor) and key not in given and id(tensor) not in of_adapters
    }
    missing = [key for key in wanted if key not in given]
    if missing:
        if any(key.startswith(f"_orig_mod.{missing[0]}") for key in given):
            raise ValueError(
                f"{caller}: state_dict has the keys of torch.compile(model), under which Trainer cannot resume; "
                "compile in place by model.compile(), or by TrainingArguments(torch_compile=True)"
            )
        raise ValueError(
            f"{caller}: state_dict lacks {len(missing)} keys of model.state_dict(), {shown(missing[0])} for one; pass "
            "all of them, or none"
        )
    values = {
        id(tensor): nn.Parameter(given[key], tensor.requires_grad) if isinstance(tensor, nn.Parameter) else given[key]
        for key, tensor in wanted.items()
    }
    with ExitStack() as stack:
        for sub in module.modules():
            for held in (sub._parameters, sub._buffers):
                for name, tensor in held.items():
                    value = values.get(id(tensor), tensor)
                    if tensor is not None and value is not tensor:
                        stack.callback(held.__setitem__, name, tensor)
                        held[name] = value
        yield
