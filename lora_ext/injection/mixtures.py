"""Defines ``target_modules="all-linear"`` in a mixture of experts.

Since version 5, Transformers keeps a mixture's experts as 3-dimensional parameters and its routers as modules with a
bare weight. PEFT adapts them as ``target_parameters`` in the architectures that Transformers' table names.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from lora_ext._common.printable import shown
from lora_ext._common.warnings import warn_user
from lora_ext.config import ALL_LINEAR, LoraConfig
from lora_ext.injection.targets import Targets, is_all_linear, linear_layers, unsupported_layers
from lora_ext.matching.path_names import EndTable, Parents, SuffixTable
from lora_ext.matching.path_patterns import PathMatcher
from lora_ext.model.bare_model import BareModel
from lora_ext.nn.linear import is_linear

# For each kind of mixture, the names of its projections before Transformers 5, and the parameters that hold them now.
# From peft/utils/transformers_weight_conversion.py, 0.21.2.
_PARAMETERS = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
_FUSED = "gate_up_proj"  # two projections in one parameter: twice the rank, with the same scaling


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
    parameters = _PARAMETERS.get(_kind_of_mixture(bare.root), {})
    all_found = set(_find(bare, parameters.values()))
    trained = SuffixTable(config.trained_modules)
    inside = Parents(path for path in bare.modules if trained.find(path))
    excluded = PathMatcher("exclude_modules", config.exclude_modules)
    found = {(path, name) for path, name in all_found if path not in inside and not excluded(path)}
    if not found:
        return config
    for key in ("lora_dropout", "lora_bias", "fan_in_fan_out"):
        if value := getattr(config, key):
            raise ValueError(
                f'inject: {key} is {value}, but target_modules is "all-linear", and the experts and '
                f"routers of {type(bare.root).__name__} are bare parameters, whose adapters know only the weight; "
                f"set {key} to {type(value)()}, or exclude them: exclude_modules={_last_names(found)}"
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
    """Warns about linear layers, quantised ones of other kinds, experts and routers that "all-linear" does not adapt.

    Args:
        config: the config as it was given, which says "all-linear".
    """
    excluded = PathMatcher("exclude_modules", config.exclude_modules)
    untouched = Parents((*targets.trained, *targets.tied))

    def is_left_out(path: str) -> bool:
        return path not in targets.modules and path not in untouched and not excluded(path)

    linear = linear_layers(bare.modules, bare.head)
    layers = [path for path in linear if is_left_out(path)]
    routers = [
        path
        for path, module in bare.modules.items()
        if is_linear(module) and path not in linear and module is not bare.head and is_left_out(path)
    ]
    experts = [
        f"{path}.{name}"
        for path, name in _experts_and_routers(bare)
        if is_left_out(path) and name not in targets.parameters.get(path, ())
    ]
    quantized = {path: why for path, why in unsupported_layers(bare.modules).items() if is_left_out(path)}
    begin = f'inject: "all-linear" leaves out parts of {type(bare.root).__name__}, as PEFT does: '
    if layers:
        warn_user(f"{begin}{_abbreviated(layers)}; to adapt them, name all layers in target_modules")
    if quantized:
        kinds = "; ".join(f"{_abbreviated(paths)}: {why}" for why, paths in _by_reason(quantized).items())
        warn_user(f'inject: "all-linear" leaves out quantised layers of {type(bare.root).__name__}: {kinds}')
    if routers:
        weights = [f"{path}.weight" for path in routers]
        warn_user(
            f'inject: "all-linear" leaves out {_abbreviated(routers)}, whose forward does not return one tensor [..., '
            "out_features] (PEFT adapts them, and fails in the forward); to adapt them, name "
            f"{_abbreviated(weights)} in target_parameters"
        )
    if experts:
        warn_user(
            f"{begin}{_abbreviated(experts)}, which are bare parameters; to adapt them, name them in target_parameters"
        )


def _kind_of_mixture(model: nn.Module) -> str | None:
    """The mixture that PEFT takes the model for, from the same table of Transformers, or None."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type == "mixtral":
        return "mixtral"
    # No import: the model of a Transformers class has loaded it.
    table = getattr(sys.modules.get("transformers.conversion_mapping"), "_MODEL_TO_CONVERSION_PATTERN", {})
    return table.get(model_type) if isinstance(model_type, str) else None


def _find(bare: BareModel, names: Iterable[str]) -> Iterator[tuple[str, str]]:
    ends = EndTable(names)
    for path, module in bare.modules.items():
        for name, _ in module.named_parameters(recurse=False):
            if f"{path}.{name}" in ends:
                yield path, name


def _experts_and_routers(bare: BareModel) -> Iterator[tuple[str, str]]:
    """Yields ``(module path, name)`` of parameters ``[num_experts, rows, columns]``, and of matrices ``[num_experts,
    columns]`` next to them; PyTorch's own layers have neither."""
    experts, numbers = {}, {}
    for path, module in bare.modules.items():
        shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters(recurse=False)}
        if not type(module).__module__.startswith("torch.") and not is_linear(module):
            experts[path] = {name: shape for name, shape in shapes.items() if len(shape) == 3 and min(shape) > 1}
            numbers |= {(path.rpartition(".")[0], shape[0]): path for shape in experts[path].values()}
    for path, held in experts.items():
        yield from ((path, name) for name in held)
        for name, parameter in bare.modules[path].named_parameters(recurse=False):
            other = numbers.get((path.rpartition(".")[0], parameter.shape[0] if parameter.dim() == 2 else 0), path)
            if other != path:
                yield path, name


def _last_names(found: Iterable[tuple[str, str]]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path, _ in found})


def _by_reason(reasons: dict[str, str]) -> dict[str, list[str]]:
    by_reason: dict[str, list[str]] = {}
    for path, why in reasons.items():
        by_reason.setdefault(why, []).append(path)
    return by_reason


def _abbreviated(paths: Iterable[str]) -> str:
    """Returns paths that differ in numbers only as one, with stars."""
    return shown(list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", path) for path in paths)), 2000)
