"""Refuses trainers that would silently compute with something else than the injected model, or train something else.

TRL tells a model its method by the public ``add_model_tags``. Most of TRL's methods compare with a reference model, and
make it of a PeftModel's own adapters; for any other model they load the checkpoint again, without the adapters.

PEFT (``get_peft_model``, a trainer's ``peft_config``, Transformers' ``add_adapter``) adds its config to the attribute
``peft_config`` of a model that has one, before it changes a layer. An injected model has one that refuses that.
"""

from __future__ import annotations

import types
from typing import NoReturn

from torch import nn

from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter_layer import INSTEAD_OF_PEFT

_METHOD = "add_model_tags"
_CONFIGS = "peft_config"
_WITHOUT_REFERENCE = {"sft", "reward-trainer"}  # TRL's names of the methods that train the model that they are given


class NoPeftConfigs(dict):
    """The configs of PEFT's adapters in an injected model: none, and none can be added."""

    def update(self, *configs: object) -> NoReturn:
        raise ValueError(f"PEFT cannot adapt an injected model: {INSTEAD_OF_PEFT}")

    __setitem__ = update


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

    RuntimeError: a trainer of TRL whose method may need a reference model, or the output head is adapted.
    """
    if "trl" in tags:
        if not _WITHOUT_REFERENCE & {*tags}:
            raise RuntimeError(
                f"inject: TRL's trainer ({', '.join(tags)}) would make its reference of the checkpoint, without the "
                "adapters; let PEFT adapt the plain model, and call lora_ext.integrations.peft.accelerate on it"
            )
        if isinstance(model.get_output_embeddings(), LoraLayer):
            raise RuntimeError(
                "inject: the output head has an adapter, but TRL reads the head's weight without calling it; leave it "
                "out of target_modules, or train it in full (modules_to_save)"
            )
    getattr(type(model), _METHOD)(model, tags)
