"""Refuses targets that cannot be adapted as a config asks, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

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
    if problems := list(_of_unsupported_kinds(bare, targets, config)):
        kinds = ", ".join(kind.base_kinds for kind in LORA_LAYERS)
        raise TypeError(
            f"inject: the config names parts that cannot be adapted; supported are {kinds}, and parameters. Narrow the "
            f"settings that name them, or add to exclude_modules:{listed(problems)}"
        )
    _check_tokens(bare, targets)
    _check_present_adapters(bare, targets, config)
    _check_offloaded(bare, targets, config)


def _of_unsupported_kinds(bare: BareModel, targets: Targets, config: LoraConfig) -> Iterator[str]:
    """Yields each part that cannot be adapted or trained, and why."""
    for path, module, setting in adapted_modules(bare, targets, config):
        if (why := _why_not(bare, config, path, setting)) is not None:
            yield f"{path} ({type(module).__name__}): {why}"
    inside = Parents(targets.trained)
    for path, module in bare.modules.items():
        if path in inside and (quantized_weight(module, any_kind=True) or why_unsupported(module)) is not None:
            yield (
                f"{path} ({type(module).__name__}): modules_to_save would train its quantised weight; adapt it by "
                "target_modules, or leave it unquantised (llm_int8_skip_modules, modules_to_not_convert)"
            )
    for path, name in ((path, name) for path, names in targets.parameters.items() for name in names):
        why = LoraParameter.why_not_parameter(bare.modules[path], name) or why_bypassed_at(bare, path)
        if why is None and attention_around(bare, path) is not None:
            why = f"nn.MultiheadAttention reads it and never calls its module; name {path!r} in target_modules"
        if why is not None:
            yield f"{path}.{name}: {why}"
    for path in (*targets.tokens, *targets.tied):
        if (why := TrainableTokens.why_not(bare.modules[path])) is not None:
            yield f"{path} ({type(bare.modules[path]).__name__}): trainable_token_indices cannot train its rows: {why}"


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


def _check_tokens(bare: BareModel, targets: Targets) -> None:
    for path, tokens in targets.tokens.items():
        size = len(bare.modules[path].weight)
        if not tokens:
            raise ValueError(f"inject: trainable_token_indices names no token of {path!r}; leave it out")
        if wrong := [token for token in tokens if token >= size]:
            raise ValueError(
                f"inject: trainable_token_indices names the tokens {shown(wrong)}, but {path!r} has {size}; resize the "
                "embedding first (resize_token_embeddings)"
            )


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
