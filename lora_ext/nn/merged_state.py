"""Marks a ``state_dict`` that was taken while adapters were merged, so that no update is counted twice or lost.

A merged layer adds one small tensor to its state; a layer with nothing merged adds nothing, and its keys are exactly
those of its parameters and buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_ext.nn.layer import LoraLayer

MERGED_KEY = "_extra_state"
"""PyTorch's name for state that is not a parameter; its tools (torch.distributed.checkpoint) know it."""


def check_same_merged(layer: LoraLayer, state: Mapping[str, Any], prefix: str) -> None:
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
