"""Refuses PEFT on an injected model, and TRL's trainers that would silently train something else than it.

TRL tells a model its method by the public ``add_model_tags``. Most of its methods compare with a reference model. They
make it of a PeftModel's own adapters; for any other model they load the checkpoint again, without the adapters.

PEFT (``get_peft_model``, ``peft_config``, Transformers' ``add_adapter``) adds its config to the attribute
``peft_config`` of a model that has one, before it changes a layer. That of an injected model refuses it.
"""

from __future__ import annotations

from typing import NoReturn

from torch import nn

from lora_ext.model.replaced_methods import ReplacedMethod, replace_attribute
from lora_ext.nn import LoraLayer
from lora_ext.nn.adapter_layer import INSTEAD_OF_PEFT

_WITHOUT_REFERENCE = {"sft", "reward-trainer"}  # TRL's names of the methods that train the model that they are given


class NoPeftConfigs(dict):
    """The configs of PEFT's adapters in an injected model: none, and none can be added."""

    def update(self, *configs: object) -> NoReturn:
        raise ValueError(f"PEFT cannot adapt an injected model: {INSTEAD_OF_PEFT}")

    __setitem__ = update


class TagsOfTrainers(ReplacedMethod):
    """The ``add_model_tags`` of a model. RuntimeError: TRL's method may need a reference, or the head is adapted."""

    def __call__(self, tags: list[str] | str) -> None:
        if "trl" in tags and not _WITHOUT_REFERENCE & {*tags}:
            raise RuntimeError(
                f"inject: TRL's trainer ({', '.join(tags)}) would make its reference of the checkpoint, without the "
                "adapters; let PEFT adapt the plain model, and call lora_ext.integrations.peft.accelerate on it"
            )
        if "trl" in tags and isinstance(self.module.get_output_embeddings(), LoraLayer):
            raise RuntimeError(
                "inject: the output head has an adapter, but TRL reads the head's weight without calling it; leave it "
                "out of target_modules, or train it in full (modules_to_save)"
            )
        self.original(tags)


def guard_against_trainers(root: nn.Module) -> None:
    """Makes a model refuse PEFT, and a Transformers model check the TRL trainer that it is given to."""
    replace_attribute(root, "peft_config", NoPeftConfigs())
    TagsOfTrainers.put("add_model_tags", root)
