"""Defines ``target_modules="all-linear"`` in a mixture of experts.

Since version 5, Transformers keeps a mixture's experts as 3-dimensional parameters and its routers as modules with a
bare weight. PEFT adapts them as ``target_parameters`` in the architectures of the table below.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from lora_ext._common.printable import shown
from lora_ext._common.warnings import warn_user
from lora_ext.config import ALL_LINEAR, LoraConfig
from lora_ext.injection.check_targets import why_bypassed_at
from lora_ext.injection.targets import Targets, is_all_linear, linear_layers, unsupported_layers
from lora_ext.matching.path_names import EndTable, Parents, SuffixTable
from lora_ext.matching.path_patterns import PathMatcher
from lora_ext.model.bare_model import BareModel
from lora_ext.nn.base_layer import why_output_unusable
from lora_ext.nn.linear import is_linear

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


def expand_all_linear(config: LoraConfig, others: Sequence[str], bare: BareModel) -> LoraConfig:
    """Returns the config with names in place of "all-linear", if more is adapted: other names, a mixture's parameters.

    Args:
        config: names "all-linear", alone or in a list.
        others: the other names of the list.
    """
    config = _with_experts(dataclasses.replace(config, target_modules=ALL_LINEAR), bare)
    if not others:
        return config
    layers = linear_layers(bare.modules, bare.head) if is_all_linear(config) else config.target_modules
    return dataclasses.replace(config, target_modules=(*layers, *others))


def _with_experts(config: LoraConfig, bare: BareModel) -> LoraConfig:
    """Returns the config, which says "all-linear", with the parts that PEFT adapts in a mixture by name.

    Other models get their config back. PEFT knows a mixture's parts by the names of projections, and takes dense
    layers of these names for experts: they are not adapted, and :func:`warn_of_parts_left_out` names them.

    Raises:
        ValueError: the config has an option that bare parameters cannot have; PEFT refuses it, too.
    """
    model_type = getattr(getattr(bare.root, "config", None), "model_type", None)
    parameters = _MIXTURES.get(model_type, {}) if isinstance(model_type, str) else {}
    ends = EndTable(parameters.values())
    all_found = {
        (path, name)
        for path, module in bare.modules.items()
        for name, _ in module.named_parameters(recurse=False)
        if f"{path}.{name}" in ends
    }
    trained = SuffixTable(config.trained_modules)
    inside = Parents(path for path in bare.modules if trained.find(path))
    excluded = PathMatcher("exclude_modules", config.exclude_modules)
    found = {(path, name) for path, name in all_found if path not in inside and not excluded(path)}
    if not found:
        return config
    for key in ("lora_dropout", "lora_bias", "fan_in_fan_out"):
        if value := getattr(config, key):
            names = sorted({path.rpartition(".")[2] for path, _ in found})
            raise ValueError(
                f'inject: {key} is {value}, but target_modules is "all-linear", and the experts and '
                f"routers of {type(bare.root).__name__} are bare parameters, whose adapters know only the weight; "
                f"set {key} to {type(value)()}, or exclude them: exclude_modules={names}"
            )
    paths = {f"{path}.{name}" for path, name in found}
    if found == all_found:  # PEFT's spelling: it wants the same names in all adapters of a model
        paths = {name for name in parameters.values() if any(path in EndTable([name]) for path in paths)}
    ranks, alphas = {}, {}
    if any(name == _FUSED for _, name in found):
        ranks, alphas = {rf".*\.{_FUSED}": 2 * config.r}, {rf".*\.{_FUSED}": 2 * config.lora_alpha}
    linear = linear_layers(bare.modules, bare.head)
    return dataclasses.replace(
        config,
        target_modules=[path for path in linear if path.rpartition(".")[2] not in parameters],
        target_parameters={*(config.target_parameters or ()), *paths},
        rank_pattern={**config.rank_pattern, **ranks},
        alpha_pattern={**config.alpha_pattern, **alphas},
    )


def warn_of_parts_left_out(config: LoraConfig, bare: BareModel, targets: Targets) -> None:
    """Warns about linear layers, quantised layers of other kinds and experts that "all-linear" does not adapt.

    Args:
        config: the config as it was given, which says "all-linear".
    """
    excluded = PathMatcher("exclude_modules", config.exclude_modules)
    known = Parents((*targets.trained, *targets.tied))
    unsupported = unsupported_layers(bare.modules)
    layers, parameters, refused = [], [], {}
    for path, module in bare.modules.items():
        if path in targets.modules or path in known or module is bare.head or excluded(path):
            continue
        if why := unsupported.get(path) or (why_bypassed_at(bare, path) if is_linear(module) else None):
            refused.setdefault(why, []).append(path)
        elif is_linear(module) and why_output_unusable(module) is None:
            layers.append(path)
        elif is_linear(module):  # a router, say, that returns more than a tensor
            parameters += [f"{path}.weight"] * ("weight" not in targets.parameters.get(path, ()))
        elif not type(module).__module__.startswith("torch."):
            stacks = {name for name, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape) > 1}
            parameters += [f"{path}.{name}" for name in stacks.difference(targets.parameters.get(path, ()))]
    for paths, key in ((layers, "target_modules"), (parameters, "target_parameters")):
        if paths:
            warn_user(
                f'inject: "all-linear" leaves out {_abbreviated(paths)} of {type(bare.root).__name__}; to adapt them, '
                f"name them in {key}"
            )
    for why, paths in refused.items():
        warn_user(f'inject: "all-linear" leaves out {_abbreviated(paths)} of {type(bare.root).__name__}: {why}')


def _abbreviated(paths: Iterable[str]) -> str:
    """Returns paths that differ in numbers only as one, with stars."""
    return shown(sorted({re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths}), 2000)
