"""The ways to put LoRA on a model, for tests that compare them. A new way is one more row of :data:`WAYS`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
from support.peft_files import save_with_peft
from torch import nn

from lora_ext import load_adapter, merge, set_adapter, unmerge
from lora_ext.integrations.peft import accelerate


class Way(NamedTuple):
    """How one library adapts a model.

    Attributes:
        add: called with a model, bare or adapted, an adapter's directory and its name; returns the adapted model. The
            adapter is trainable.
        switch: called with the model and the names of the adapters to use.
        merge, unmerge: called with the model.
    """

    add: Callable[[nn.Module, Path, str], nn.Module]
    switch: Callable[..., Any]
    merge: Callable[[nn.Module], Any]
    unmerge: Callable[[nn.Module], Any]


def _add_with_peft(model: nn.Module, directory: Path, name: str) -> nn.Module:
    if not isinstance(model, peft.PeftModel):
        return peft.PeftModel.from_pretrained(model, directory, name, is_trainable=True)
    model.load_adapter(directory, name, is_trainable=True)
    return model


def _switch_with_peft(model: peft.PeftModel, *names: str) -> None:
    model.base_model.set_adapter(list(names))


PEFT = Way(
    add=_add_with_peft,
    switch=_switch_with_peft,
    merge=lambda model: model.merge_adapter(),
    unmerge=lambda model: model.unmerge_adapter(),
)
WAYS = {
    "inject": Way(
        add=lambda model, directory, name: load_adapter(model, directory, True, name, activate=True),
        switch=lambda model, *names: set_adapter(model, list(names)),
        merge=merge,
        unmerge=unmerge,
    ),
    "accelerate": PEFT._replace(add=lambda *arguments: accelerate(_add_with_peft(*arguments))),
}


def save_random_adapter(base: nn.Module, directory: Path, **options: Any) -> Path:
    """Saves an adapter for ``base`` with both factors random, so that it changes the output. Returns ``directory``."""
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "init_lora_weights": False} | options)
    save_with_peft(peft.get_peft_model(copy.deepcopy(base), config), directory, save_embedding_layers=False)
    return directory


def adapted(way: Way, base: nn.Module, directory: Path, *names: str) -> nn.Module:
    """A copy of ``base`` with the adapter in ``directory`` as ``default``, or those in its folders ``names``.

    The first one is in use.
    """
    model = copy.deepcopy(base)
    for name in names or ["default"]:
        model = way.add(model, directory / name if names else directory, name)
    way.switch(model, *names[:1] or ["default"])
    return model
