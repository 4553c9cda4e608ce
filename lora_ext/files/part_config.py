"""A config for a part of an adapted model that is saved by itself."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from lora_ext._common.printable import shown
from lora_ext.config import LoraConfig, exact_patterns
from lora_ext.injection.targets import find_targets
from lora_ext.model.adapter_set import Adapter
from lora_ext.model.bare_model import BareModel
from lora_ext.nn import LoraLayer
from lora_ext.nn.parameter import LoraParameter
from lora_ext.nn.trainable_tokens import TiedRows, TrainableTokens
from lora_ext.nn.trained import TrainedModule


def config_within(caller: str, part: nn.Module, adapter: Adapter) -> LoraConfig:
    """A config that describes ``adapter`` for ``part`` of the model that it was made for. ValueError: there is none."""
    config, parts = adapter.config, adapter.parts
    low_rank = [p for p in parts if isinstance(p.layer, LoraLayer)]
    tokens = {p.path: p.adapter.tokens for p in parts if isinstance(p.layer, TrainableTokens) and not _is_tied(p)}
    explicit = {
        "target_modules": [p.target for p in low_rank if not isinstance(p.layer, LoraParameter)] or None,
        "target_parameters": [p.target for p in low_rank if isinstance(p.layer, LoraParameter)] or None,
        "modules_to_save": [p.path for p in parts if isinstance(p.layer, TrainedModule)] or None,
        "trainable_token_indices": tokens or None,
        "rank_pattern": exact_patterns({p.target: p.adapter.r for p in low_rank}, config.r),
        "alpha_pattern": exact_patterns({p.target: config.alpha_for(p.target) for p in low_rank}, config.lora_alpha),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "task_type": None,
    }
    if config.bias == "none":
        for changes in ({}, explicit):
            try:
                candidate = dataclasses.replace(config, **changes)
            except (TypeError, ValueError):
                continue
            if _describes(candidate, part, parts):
                return candidate
    raise ValueError(
        f"{caller}: no config describes the adapter {adapter.name!r} for this part of the model alone (its "
        f"target_modules are {shown(config.target_modules)}, its bias {config.bias!r}); save the whole model, or call "
        "lora_ext.save_adapter on it"
    )


def _is_tied(part: Any) -> bool:
    return isinstance(part.adapter, TiedRows)


def _describes(config: LoraConfig, module: nn.Module, parts: tuple[Any, ...]) -> bool:
    """Returns whether injecting the bare ``module`` with ``config`` makes ``parts``."""
    bare = BareModel(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a name that matches nothing
        try:
            found = find_targets(config, type(module).__name__, bare.modules, bare.head, bare.embedding)
        except (ValueError, UserWarning):
            return False
    parameters = (f"{path}.{name}" for path, names in found.parameters.items() for name in names)
    if {*found.modules, *parameters, *found.trained, *found.tokens, *found.tied} != {part.target for part in parts}:
        return False
    return all(
        config.rank_for(part.target) == part.adapter.r and config.scaling_for(part.target) == part.adapter.scaling
        for part in parts
        if isinstance(part.layer, LoraLayer)
    )
