"""Refuses targets that cannot be adapted as a config asks, before anything is built."""

from __future__ import annotations

from lora_ext._common.printable import listed, shown
from lora_ext.config import LoraConfig
from lora_ext.injection.all_linear import why_bypassed_at
from lora_ext.injection.build import adapted_modules, attention_around, lora_layer_for
from lora_ext.injection.targets import Targets
from lora_ext.matching.path_names import Parents
from lora_ext.model.bare_model import BareModel
from lora_ext.nn import LORA_LAYERS, DoraLinear, LoraLayer, LoraPackedLinear, LoraParameter
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.base_layer import is_offloaded
from lora_ext.nn.trainable_tokens import TrainableTokens
from lora_ext.quantized import quantized_weight, why_unsupported


def check_targets(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses targets that cannot be adapted as the config asks.

    Raises:
        TypeError: targets are of unsupported kinds; all are listed.
        ValueError: a token does not exist; values to train are offloaded; or a module has adapters of another kind.
    """
    _check_modules(bare, targets, config)
    _check_trained(bare, targets)
    _check_tokens(bare, targets)
    _check_parameters(bare, targets)
    _check_present_adapters(bare, targets, config)
    _check_offloaded(bare, targets, config)


def _check_modules(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    problems = []
    for path, module, setting in adapted_modules(bare, targets, config):
        if (problem := _why_not(bare, config, path, setting)) is not None:
            problems.append(f"{path} ({type(module).__name__}): {problem}")
    if problems:
        kinds = ", ".join(kind.base_kinds for kind in LORA_LAYERS)
        raise TypeError(
            f"inject: target_modules matches modules that cannot be adapted; supported are {kinds}. Narrow "
            f"target_modules, or add to exclude_modules:{listed(problems)}"
        )


def _why_not(bare: BareModel, config: LoraConfig, path: str, setting: str) -> str | None:
    """Returns why the module at ``path``, whose rank is set by the path ``setting``, cannot be adapted, or None."""
    module, kind = bare.modules[path], lora_layer_for(bare.modules[path], config, setting)
    only_linear = f"use_dora supports only {DoraLinear.base_kinds}"
    if quantized_weight(module) is None:
        if kind is None and config.enable_lora_for(setting) is not None:
            return f"enable_lora names it, but supports only {LoraPackedLinear.base_kinds}"
        if kind is None and config.use_dora:
            return only_linear
        if (why := why_unsupported(module)) is not None:
            return why
    if kind is None:
        return f"no LoRA layer adapts {type(module).__name__}"
    attention = attention_around(bare, path)
    if attention is None or (why := kind.why_not(module, config)) is not None:
        return kind.why_not(module, config) or why_bypassed_at(bare, path)
    why = only_linear if config.use_dora else LoraMultiheadAttention.why_not(attention, config)
    if why is None and attention is bare.root:
        why = "it is the model itself; put it into another module"
    return why and f"nn.MultiheadAttention reads its weight and never calls it, and {why}"


def _check_trained(bare: BareModel, targets: Targets) -> None:
    """Refuses to train quantised weights in full: they are integers."""
    inside, problems = Parents(targets.trained), []
    for path, module in bare.modules.items():
        if path in inside and (quantized_weight(module, any_kind=True) or why_unsupported(module)) is not None:
            problems.append(f"{path} ({type(module).__name__})")
    if problems:
        raise TypeError(
            "inject: modules_to_save would train quantised weights. Adapt them by target_modules, or leave them "
            f"unquantised (llm_int8_skip_modules, modules_to_not_convert):{listed(problems)}"
        )


def _check_tokens(bare: BareModel, targets: Targets) -> None:
    for path in (*targets.tokens, *targets.tied):
        module, tokens = bare.modules[path], targets.tokens.get(path)
        if problem := TrainableTokens.why_not(module):
            raise TypeError(
                f"inject: trainable_token_indices cannot train rows of {path!r} ({type(module).__name__}): {problem}"
            )
        if tokens == ():
            raise ValueError(f"inject: trainable_token_indices names no token of {path!r}; leave it out")
        if wrong := [token for token in tokens or () if token >= len(module.weight)]:
            raise ValueError(
                f"inject: trainable_token_indices names the tokens {shown(wrong)}, but {path!r} has "
                f"{len(module.weight)}; resize the embedding first (resize_token_embeddings)"
            )


def _check_parameters(bare: BareModel, targets: Targets) -> None:
    problems = []
    for path, name in ((path, name) for path, names in targets.parameters.items() for name in names):
        reason = LoraParameter.why_not_parameter(bare.modules[path], name) or why_bypassed_at(bare, path)
        if reason is None and attention_around(bare, path) is not None:
            reason = f"nn.MultiheadAttention reads it and never calls its module; name {path!r} in target_modules"
        if reason is not None:
            problems.append(f"{path}.{name}: {reason}")
    if problems:
        raise TypeError(f"inject: target_parameters matches parameters that cannot be adapted:{listed(problems)}")


def _check_present_adapters(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses targets whose layers hold adapters of a kind that the new one cannot join."""
    for path in (*targets.modules, *targets.parameters):
        wanted = {
            "target_parameters": path in targets.parameters,
            "use_dora": config.use_dora,
            "parts in enable_lora": len(config.enable_lora_for(path) or ()),
        }
        for layer in (layer for layer in bare.layers.get(path, ()) if isinstance(layer, LoraLayer)):
            present = {
                "target_parameters": isinstance(layer, LoraParameter),
                "use_dora": isinstance(layer, DoraLinear),
                "parts in enable_lora": layer.num_parts if isinstance(layer, LoraPackedLinear) else 0,
            }
            for key in (key for key in wanted if wanted[key] != present[key]):
                raise ValueError(
                    f"inject: {path!r} has adapters ({list(layer.adapters) or 'those of an AdapterPool'}) with {key}: "
                    f"{present[key]}, and one with {wanted[key]} cannot join them; adapt it in the same way, or remove "
                    "them first (delete_adapter(model, ...), or pool.close())"
                )


def _check_offloaded(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses to train copies of values that accelerate keeps elsewhere."""
    inside = Parents(targets.trained)
    for path, module in bare.modules.items():
        for name in module._parameters:
            key = "modules_to_save" if path in inside else "bias"
            is_trained = path in inside or (name == "bias" and config.bias != "none")
            if is_trained and is_offloaded(module, name):
                raise ValueError(
                    f"inject: {key} trains the {name} of {path!r}, which is offloaded; keep it on a device (device_map)"
                )
