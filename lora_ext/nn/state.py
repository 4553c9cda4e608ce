"""What an adapted model's ``state_dict`` holds besides its parameters and buffers, and under which keys.

The keys are those of ``named_parameters``, as FSDP, ``torch.distributed.checkpoint``, ``torch.export`` and
``functional_call`` expect. Within :func:`base_keys`, adapter layers write the base model's keys. A layer with merged
adapters adds a mark, so that no update is counted twice or lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.nn.layer import LoraLayer

_uses_base_keys: ContextVar[bool] = ContextVar("lora_ext_base_keys", default=False)

MERGED_KEY = "_extra_state"
"""PyTorch's name for state that is not a parameter; its tools (torch.distributed.checkpoint) know it."""


@contextmanager
def base_keys() -> Iterator[None]:
    """Gives ``state_dict`` of adapted models the base model's keys and no adapter's, in this thread.

    The values are those that the model computes with, except for updates that are not merged.
    """
    token = _uses_base_keys.set(True)
    try:
        yield
    finally:
        _uses_base_keys.reset(token)


def uses_base_keys() -> bool:
    """Returns whether this thread is within :func:`base_keys`."""
    return _uses_base_keys.get()


def check_nothing_merged(layer: LoraLayer, state: Mapping[str, Any], prefix: str) -> None:
    """Checks that no adapter is merged into ``layer``, nor into its weights in ``state``, if these are to be loaded.

    The record that unmerges a weight is not in the state.

    Args:
        prefix: of the layer's keys in ``state``.

    Raises:
        RuntimeError: something is merged (the message has the remedy).
    """
    in_state = prefix + MERGED_KEY in state
    if not (in_state or layer.is_merged) or not any(prefix + path in state for path in layer.merged_into()):
        return
    where = repr(prefix.removesuffix(".") or type(layer).__name__)
    place = "the state, where the update would count twice" if in_state else "the model"
    raise RuntimeError(
        f"load_state_dict: adapters are merged into {where} in {place}; call unmerge(model) before taking or loading a "
        "state_dict"
    )
