"""Refuses targets that cannot be adapted as a config asks, before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

from lora_ext._common.matching import Parents
from lora_ext._common.messages import listed, shown
from lora_ext.config import LoraConfig
from lora_ext.injection.all_linear import why_bypassed_at
from lora_ext.injection.build import Kind, adapted_modules, attention_around, lora_layer_for
from lora_ext.injection.targets import Targets
from lora_ext.model.bare_model import BareModel
from lora_ext.nn import LORA_LAYERS, DoraLinear, LoraLayer, LoraPackedLinear, LoraParameter
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.base_layer import is_offloaded
from lora_ext.nn.trainable_tokens import TrainableTokens
from lora_ext.quantized import quantized_weight, why_unsupported


def check_targets(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses targets that cannot be adapted as the config asks.

    Raises:
        TypeError: parts cannot be adapted or trained; all are listed.
        ValueError: a module has adapters of another kind.
    """
    problems = [
        *_of_layers(bare, targets, config),
        *_of_parameters(bare, targets),
        *_of_trained_values(bare, targets, config),
        *_of_tokens(bare, targets),
    ]
    if problems:
        kinds = ", ".join(kind.base_kinds for kind in LORA_LAYERS)
        raise TypeError(
            f"inject: the config names parts that cannot be adapted; supported are {kinds}, and parameters. Narrow the "
            f"settings that name them, or add to exclude_modules:{listed(problems)}"
        )
    _check_present_adapters(bare, targets, config)


def _of_layers(bare: BareModel, targets: Targets, config: LoraConfig) -> Iterator[str]:
    for path, setting, kind in adapted_modules(bare, targets, config):
        if (why := _why_not(bare, config, path, setting, kind)) is not None:
            yield f"{path} ({type(bare.modules[path]).__name__}): {why}"


def _why_not(bare: BareModel, config: LoraConfig, path: str, setting: str, kind: Kind) -> str | None:
    """Returns why the module at ``path``, whose rank is set by the path ``setting``, cannot be adapted, or None."""
    module = bare.modules[path]
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


def _of_parameters(bare: BareModel, targets: Targets) -> Iterator[str]:
    for path, name in ((path, name) for path, names in targets.parameters.items() for name in names):
        why = LoraParameter.why_not_parameter(bare.modules[path], name) or why_bypassed_at(bare, path)
        if why is None and attention_around(bare, path) is not None:
            why = f"nn.MultiheadAttention reads it and never calls its module; name {path!r} in target_modules"
        if why is not None:
            yield f"{path}.{name}: {why}"


def _of_trained_values(bare: BareModel, targets: Targets, config: LoraConfig) -> Iterator[str]:
    """Yields the modules whose values cannot be copied to train them, or their biases."""
    inside = Parents(targets.trained)
    for path, module in bare.modules.items():
        is_trained = path in inside
        if is_trained and (quantized_weight(module, any_kind=True) or why_unsupported(module)) is not None:
            yield (
                f"{path} ({type(module).__name__}): modules_to_save would train its quantised weight; adapt it by "
                "target_modules, or leave it unquantised (llm_int8_skip_modules, modules_to_not_convert)"
            )
        for name in module._parameters if is_trained or config.bias != "none" else ():
            if (is_trained or name == "bias") and is_offloaded(module, name):
                key = "modules_to_save" if is_trained else "bias"
                yield f"{path}.{name}: {key} trains it, but it is offloaded; keep it on a device (device_map)"


def _of_tokens(bare: BareModel, targets: Targets) -> Iterator[str]:
    for path in (*targets.tokens, *targets.tied):
        module = bare.modules[path]
        if (why := TrainableTokens.why_not(module)) is not None:
            yield f"{path} ({type(module).__name__}): trainable_token_indices cannot train its rows: {why}"
        elif path in targets.tokens and not targets.tokens[path]:
            yield f"{path}: trainable_token_indices names none of its tokens; leave it out"
        elif wrong := [token for token in targets.tokens.get(path, ()) if token >= len(module.weight)]:
            yield (
                f"{path}: trainable_token_indices names the tokens {shown(wrong)}, but it has {len(module.weight)}; "
                "resize the embedding first (resize_token_embeddings)"
            )


def _check_present_adapters(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses targets whose layers hold adapters of a kind that the new one cannot join."""
    for path in (*targets.modules, *targets.parameters):
        kind = LoraParameter if path in targets.parameters else lora_layer_for(bare.modules[path], config, path)
        parts = len(config.enable_lora_for(path) or ())
        for layer in (layer for layer in bare.layers.get(path, ()) if isinstance(layer, LoraLayer)):
            if type(layer) is not kind or getattr(layer, "num_parts", parts) != parts:
                raise ValueError(
                    f"inject: {path!r} has adapters ({list(layer.adapters) or 'those of an AdapterPool'}) in a "
                    f"{type(layer).__name__}, which the new one cannot join; adapt it in the same way (use_dora, "
                    "enable_lora, target_parameters), or remove them (delete_adapter(model, ...), pool.close())"
                )
