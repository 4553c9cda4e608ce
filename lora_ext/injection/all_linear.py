"""Defines ``target_modules="all-linear"``, also in a mixture of experts.

Since version 5, Transformers keeps a mixture's experts as 3-dimensional parameters and its routers as modules with a
bare weight. PEFT adapts them as ``target_parameters`` in the architectures of the table below.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from lora_ext._common.matching import EndTable, Parents, PathMatcher
from lora_ext._common.messages import shown, warn_user
from lora_ext.config import ALL_LINEAR, LoraConfig
from lora_ext.model.bare_model import BareModel
from lora_ext.nn.base_layer import why_bypassed, why_output_unusable
from lora_ext.nn.linear import is_linear
from lora_ext.quantized import quantized_weight, why_unsupported

if TYPE_CHECKING:
    from lora_ext.injection.targets import Targets

_FUSED = "gate_up_proj"  # two projections in one parameter: twice the rank, with the same scaling
# The names of a mixture's projections before Transformers 5, and the parameters that hold them now; the model types
# whose mixtures have these names. From PEFT 0.21.2 and Transformers 5.13.
_LIKE_MIXTRAL = {"gate": "gate.weight", "w1": _FUSED, "w3": _FUSED, "w2": "down_proj"}
_LIKE_QWEN2 = {"gate": "gate.weight", "gate_proj": _FUSED, "up_proj": _FUSED, "down_proj": "down_proj"}
_QWEN2_TYPES = """
afmoe beam cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe
glm4_moe_lite glm4v_moe glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next
qwen3_omni_moe qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open
"""
_MIXTURES = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _LIKE_MIXTRAL),
    **dict.fromkeys(_QWEN2_TYPES.split(), _LIKE_QWEN2),
}


def is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def linear_layers(bare: BareModel) -> list[str]:
    """The layers that "all-linear" means: linear ones that take an update, without the output head."""
    return [
        path
        for path, module in bare.modules.items()
        if is_linear(module)
        and module is not bare.head
        and why_output_unusable(module) is None
        and why_bypassed_at(bare, path) is None
    ]


def why_bypassed_at(bare: BareModel, path: str) -> str | None:
    """Returns why an adapter of the module at ``path`` would have no effect, or None if that is not known."""
    return why_bypassed(bare.parent(path), path.rpartition(".")[2])


def expand_all_linear(config: LoraConfig, bare: BareModel) -> LoraConfig:
    """Returns the config; in place of "all-linear" in a mixture, it names the parts that PEFT adapts there.

    PEFT knows a mixture's parts by the names of projections, and takes dense layers of these names for experts: they
    are not adapted, and :func:`warn_of_parts_left_out` names them.

    ValueError: the config has an option that bare parameters cannot have; PEFT refuses it, too.
    """
    model_type = getattr(getattr(bare.root, "config", None), "model_type", None)
    parameters = _MIXTURES.get(model_type, {}) if isinstance(model_type, str) else {}
    ends, inside = EndTable(parameters.values()), Parents(p for p in bare.modules if p.endswith(config.trained_modules))
    excluded = PathMatcher("exclude_modules", config.exclude_modules)
    named, left_out = set(), set()
    for path, module in bare.modules.items() if parameters and is_all_linear(config) else ():
        found = {f"{path}.{name}" for name, _ in module.named_parameters(recurse=False) if f"{path}.{name}" in ends}
        (left_out if path in inside or excluded(path) else named).update(found)
    if not named:
        return config
    for key in ("lora_dropout", "lora_bias", "fan_in_fan_out"):
        if getattr(config, key):
            names = sorted({path.split(".")[-2] for path in named})
            raise ValueError(
                f'inject: {key} is {getattr(config, key)}, but target_modules is "all-linear", and the experts and '
                f"routers of {type(bare.root).__name__} are bare parameters; leave {key} at its default, or exclude "
                f"them: exclude_modules={names}"
            )
    ranks, alphas = {}, {}
    if any(path.endswith(_FUSED) for path in named):
        ranks, alphas = {rf".*\.{_FUSED}": 2 * config.r}, {rf".*\.{_FUSED}": 2 * config.lora_alpha}
    if not left_out:  # PEFT's spelling: it wants the same names in all adapters of a model
        named = {name for name in parameters.values() if any(path.endswith(f".{name}") for path in named)}
    return dataclasses.replace(
        config,
        target_modules=[path for path in linear_layers(bare) if path.rpartition(".")[2] not in parameters],
        target_parameters={*(config.target_parameters or ()), *named},
        rank_pattern={**config.rank_pattern, **ranks},
        alpha_pattern={**config.alpha_pattern, **alphas},
    )


def warn_of_parts_left_out(config: LoraConfig, bare: BareModel, targets: Targets) -> None:
    """Warns about linear layers, quantised layers of other kinds and experts that "all-linear" does not adapt."""
    excluded = PathMatcher("exclude_modules", config.exclude_modules)
    known, left_out = Parents(targets.trained), set()
    for path, module in bare.modules.items():
        if path in targets.modules or path in known or module is bare.head or excluded(path):
            continue
        if (is_linear(module) and why_output_unusable(module) is None) or _is_of_unknown_format(module):
            left_out.add(path)
        else:
            adapted = targets.parameters.get(path, ())
            left_out |= {f"{path}.{name}" for name in _weights(module) if name not in adapted}
    if left_out:
        some = sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in left_out})  # one name for all layers
        warn_user(
            f'inject: "all-linear" leaves out {shown(some, 2000)} of {type(bare.root).__name__}; name them in '
            "target_modules or target_parameters to adapt them, or to see why that is not possible"
        )


def _is_of_unknown_format(module: nn.Module) -> bool:
    looks_linear = isinstance(getattr(module, "in_features", None), int) and not is_linear(module)
    return looks_linear and quantized_weight(module) is None and why_unsupported(module) is not None


def _weights(module: nn.Module) -> Iterator[str]:
    """Yields the weight of a linear layer that returns more than a tensor (a router, say), and stacks of experts."""
    if is_linear(module):
        yield "weight"
    elif not type(module).__module__.startswith("torch."):
        yield from (name for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1)
