"""LoRA (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_ext.config import LoraConfig
from lora_ext.injection.bare_model import BareModel, root_module
from lora_ext.injection.targets import find_targets
from lora_ext.methods.base import Method, task_type
from lora_ext.nn.linear import is_conv1d, is_linear, linear_sizes


@dataclass(frozen=True)
class Lora(Method):
    """Low-rank adapters, by :func:`lora_ext.inject`.

    Args:
        config: its ``task_type``, if None, becomes that of the model, so that PEFT finds the head in the files.
    """

    config: LoraConfig
    name: ClassVar[str] = "lora"

    def lora_config(self, model: nn.Module) -> LoraConfig:
        if self.config.task_type is not None:
            return self.config
        return dataclasses.replace(self.config, task_type=task_type(model))

    def count(self, model: nn.Module) -> int:
        """``r * (in_features + out_features)`` of every target; the paper's ``2 * L_LoRA * d_model * r`` if square.

        Each part of a packed projection that is adapted (``enable_lora``) counts as a layer of its own.

        TypeError: a target is no linear layer.
        """
        bare, config = BareModel(root_module(model)), self.lora_config(model)
        targets = find_targets(config, type(bare.root).__name__, bare.modules, bare.head, bare.embedding).modules
        if others := [path for path, each in targets.items() if not (is_linear(each) or is_conv1d(each))]:
            kind = type(targets[others[0]]).__name__
            raise TypeError(f"lora: {others[0]} is a {kind}; the formula is for linear layers")
        count = 0
        for path, each in targets.items():
            enabled = config.enable_lora_for(path) or (True,)
            in_features, out_features = linear_sizes(each)
            count += config.rank_for(path) * sum(enabled) * (in_features + out_features // len(enabled))
        return count

    def options(self) -> dict[str, Any]:
        """None: the adapter's own config has them."""
        return {}
