"""Refuses trainers that would silently compute with something else than the injected model, or train something else.

TRL tells a model its method by ``add_model_tags``, after it has made its reference model. For a PEFT model the
reference is the model itself with other adapters; for any other one TRL loads the checkpoint again, without adapters.

PEFT (``get_peft_model``, a trainer's ``peft_config``, Transformers' ``add_adapter``) adds its config to the attribute
``peft_config`` of a model that has one, before it changes a layer. An injected model has one that refuses that.
"""

from __future__ import annotations

import sys
import types
from typing import Any, NoReturn

from torch import nn

from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.bare_model import adapter_layers
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter_layer import INSTEAD_OF_PEFT

_METHOD = "add_model_tags"
_CONFIGS = "peft_config"


class NoPeftConfigs(dict):
    """The configs of PEFT's adapters in an injected model: none, and none can be added."""

    def __setitem__(self, name: str, config: object) -> NoReturn:
        raise ValueError(f"PEFT cannot adapt an injected model: {INSTEAD_OF_PEFT}")

    def __missing__(self, name: str) -> NoReturn:
        raise KeyError(f"PEFT has no adapter {name!r} in an injected model; call save_adapter or load_adapter")

    def update(self, configs: object) -> NoReturn:
        self["default"] = configs


def guard_against_trainers(root: nn.Module) -> None:
    """Makes a model refuse PEFT, and a Transformers model check the TRL trainer that it is given to."""
    vars(root).setdefault(_CONFIGS, NoPeftConfigs())
    if callable(getattr(root, _METHOD, None)) and _METHOD not in vars(root):
        vars(root)[_METHOD] = types.MethodType(add_model_tags, root)


def remove_guard(module: nn.Module) -> None:
    """Undoes :func:`guard_against_trainers`."""
    if isinstance(vars(module).get(_CONFIGS), NoPeftConfigs):
        del vars(module)[_CONFIGS]
    if getattr(vars(module).get(_METHOD), "__func__", None) is add_model_tags:
        del vars(module)[_METHOD]


def add_model_tags(model: nn.Module, tags: list[str] | str) -> None:  # this name: a bound method is pickled by its name
    """Replaces the method of this name of a Transformers model.

    Raises:
        RuntimeError: the caller is a trainer of TRL that holds a reference model without the adapters, or the output
            head is adapted.
    """
    caller = sys._getframe(1).f_locals
    if "trl" in tags:
        if (problem := why_head_unusable(model)) is not None:
            raise RuntimeError(problem)
        _check_reference(caller.get("self"), caller.get("ref_model"), model)
    getattr(type(model), _METHOD)(model, tags)


def why_head_unusable(model: nn.Module) -> str | None:
    """Says why TRL cannot train the model's adapted head, or None if the head has no low-rank adapter."""
    head = model.get_output_embeddings()
    if not isinstance(head, LoraLayer):
        return None
    path = next((path for path, layer in adapter_layers(model) if layer is head), "")
    return (
        f"inject: {path!r} has an adapter, but TRL reads the head's weight without calling the head, and the adapter "
        f"would have no effect. Leave {path!r} out of target_modules, or train it in full: modules_to_save=[{path!r}]"
    )


def _check_reference(trainer: Any, given: Any, model: nn.Module) -> None:
    reference = getattr(trainer, "ref_model", None)
    if isinstance(reference, nn.Module) and given is None and adapter_set(reference) is None:
        kind = type(trainer).__name__
        raise RuntimeError(
            f"inject: {kind} has loaded {getattr(model.config, '_name_or_path', '')!r} again as its reference, without "
            "the adapters and next to the model. The model itself with a frozen copy of its adapter is the reference "
            "here:\n\n    from lora_ext.integrations.trl import for_trl\n\n"
            f"    trainer = {kind}(model=for_trl(model), ...)"
        )
