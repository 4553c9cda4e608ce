"""Collects what a model with its adapter gives its quantised layers, to round their merged weights for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.messages import first_of, warn_user
from lora_ext._common.progress import Progress
from lora_ext.merging.feedback import LayerInputs
from lora_ext.nn import LoraLayer

Batch = Mapping[str, Any] | Tensor | tuple | list
"""The arguments of one call of the model: a dict by name, a single tensor, or a tuple or list in order."""

_MASK = "attention_mask"


@torch.no_grad()
def collect_inputs(
    caller: str, model: nn.Module, layers: Mapping[str, LoraLayer], batches: Iterable[Batch]
) -> dict[LoraLayer, LayerInputs]:
    """Runs the model in eval mode on ``batches``, and returns the inputs of ``layers``. Some share theirs.

    Holds a copy of every input, in its dtype and on its device: tokens times in_features for each group of layers.
    Padding tokens are left out where a batch has an ``attention_mask [batch, sequence]``.

    TypeError: ``batches`` is a single batch. ValueError: there is none, or an input is NaN or infinite. Warns of layers
    that the model does not call.
    """
    if isinstance(batches, Mapping | Tensor):
        kind = type(batches).__name__
        raise TypeError(f"{caller}: calibration is a {kind}, want a list of batches; for one batch, [batch]")
    collector = _Collector(caller, layers)
    modes = {module: module.training for module in model.modules()}
    hooks = [
        layer.register_forward_pre_hook(partial(collector.take, path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    model.eval()
    try:
        with Progress("calibrate", len(batches) if hasattr(batches, "__len__") else 0, unit="batch") as shown:
            for batch in batches:
                collector.start(batch)
                if isinstance(batch, Mapping):
                    model(**batch)
                else:
                    model(*([batch] if isinstance(batch, Tensor) else batch))
                shown.advance(1)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    if not collector.num_batches:
        raise ValueError(f"{caller}: calibration is empty, want about 1,000 tokens of the adapter's task")
    return collector.inputs()


class _Collector:
    """Copies the inputs of layers, each tensor once."""

    def __init__(self, caller: str, layers: Mapping[str, LoraLayer]) -> None:
        self.num_batches = 0
        self._caller, self._layers = caller, layers
        self._held: dict[str, list[Tensor]] = {path: [] for path in layers}
        self._mask: Tensor | None = None
        self._seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of this batch, by id and version: input, copy

    def start(self, batch: Batch) -> None:
        """Notes the padding of the next batch."""
        self.num_batches += 1
        self._seen.clear()
        mask = batch.get(_MASK) if isinstance(batch, Mapping) else None
        self._mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def take(self, path: str, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if (seen := self._seen.get((id(x), x._version))) is not None:
            self._held[path].append(seen[1])
            return
        mask = self._mask
        is_masked = mask is not None and x.shape[:-1] == mask.shape
        rows = x[mask.to(x.device)] if is_masked else x.reshape(-1, x.shape[-1]).clone()
        if not rows.isfinite().all():
            raise ValueError(
                f"{self._caller}: calibration: batch {self.num_batches} gives {path!r} NaN or infinite inputs; leave "
                "it out"
            )
        self._seen[id(x), x._version] = x, rows  # x is held, so that no other input gets its id
        self._held[path].append(rows)

    def inputs(self) -> dict[LoraLayer, LayerInputs]:
        """Returns the inputs of the layers that were called."""
        if missing := [repr(path) for path, held in self._held.items() if not sum(map(len, held))]:
            warn_user(f"{self._caller}: no calibration batch reaches {first_of(missing)}; merged to nearest there")
        groups: dict[tuple[int, ...], LayerInputs] = {}
        found = {}
        for path, held in self._held.items():
            if sum(map(len, held)):
                found[self._layers[path]] = groups.setdefault(tuple(map(id, held)), LayerInputs(held))
        return found
