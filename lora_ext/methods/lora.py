"""LoRA (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lora_ext.config import LoraConfig
from lora_ext.injection.all_linear import expand_all_linear, linear_layers
from lora_ext.injection.targets import find_targets
from lora_ext.methods.architectures import base_model, base_path
from lora_ext.methods.base import Method, pooling_of, task_type
from lora_ext.model.bare_model import BareModel, root_module
from lora_ext.nn.linear import is_linear, linear_sizes


def linear_layers_of(model: nn.Module) -> list[str]:
    """Returns the paths of the linear layers that "all-linear" means, for lists that have other names next to them."""
    return linear_layers(BareModel(root_module(model)))


@dataclass(frozen=True)
class Lora(Method):
    """Low-rank adapters, by :func:`lora_ext.inject`.

    If the config's ``task_type`` is None, it becomes the model's, so that PEFT finds the head in the files. With the
    pooling "cls", BERT's pooler is added to ``modules_to_save``.
    """

    config: LoraConfig
    name: ClassVar[str] = "lora"

    def lora_config(self, model: nn.Module) -> LoraConfig:
        config = self.config
        saved = tuple(config.modules_to_save or ())
        has_new_pooler = pooling_of(model) == "cls" and getattr(base_model(model), "pooler", None) is not None
        if has_new_pooler and not any(f"{base_path(model)}.pooler{end}".endswith(saved) for end in ("", ".dense")):
            config = dataclasses.replace(config, modules_to_save=(*saved, "pooler"))
        return dataclasses.replace(config, task_type=config.task_type or task_type(model))

    def count(self, model: nn.Module) -> int:
        """Sums ``r * (in_features + out_features)`` over all targets; if square, ``2 * L_LoRA * d_model * r``.

        Every adapted part of a packed projection (``enable_lora``) counts as a layer. An embedding's features are its
        tokens and their size. ``use_dora`` adds ``out_features`` for each.

        TypeError: a target is neither a linear layer nor an embedding.
        """
        bare, config = BareModel(root_module(model)), self.lora_config(model)
        config = expand_all_linear(config, bare)
        found = find_targets(config, bare)
        count = 0
        for path, layer in {**found.modules, **dict.fromkeys(found.parameters)}.items():
            if isinstance(layer, nn.Embedding):
                in_features, out_features = layer.num_embeddings, layer.embedding_dim
            elif layer is not None and is_linear(layer):
                in_features, out_features = linear_sizes(layer)
            else:
                kind = type(layer).__name__ if layer is not None else "parameter"
                raise TypeError(f"lora: {path} is a {kind}; the formula is for linear layers and embeddings")
            enabled = config.enable_lora_for(path) or (True,)
            count += config.rank_for(path) * sum(enabled) * (in_features + out_features // len(enabled))
            count += out_features if config.use_dora else 0
        return count

    def options(self) -> dict[str, Any]:
        """Returns none: the adapter's config has them."""
        return {}
