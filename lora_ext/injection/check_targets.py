"""Refuses targets that cannot be adapted as a config asks, before anything is built."""

from __future__ import annotations

from torch import nn

from lora_ext._common.printable import listed, shown
from lora_ext.config import LoraConfig
from lora_ext.injection.build import adapted_modules, attention_around, lora_layer_for
from lora_ext.injection.targets import Targets
from lora_ext.matching.path_names import Parents, is_inside
from lora_ext.model.bare_model import BareModel
from lora_ext.nn import LORA_LAYERS, DoraLinear, LoraLayer, LoraPackedLinear, LoraParameter
from lora_ext.nn.attention import LoraMultiheadAttention
from lora_ext.nn.base_layer import brings_submodules, is_offloaded, why_bypassed
from lora_ext.nn.trainable_tokens import TrainableTokens
from lora_ext.quantized import quantized_weight, why_unsupported


def check_targets(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses targets that cannot be adapted as the config asks.

    Raises:
        TypeError: targets are of unsupported kinds; all are listed.
        ValueError: a token does not exist; the adapter is an aLoRA; values to train are offloaded;
            or a module was adapted by ``target_modules`` and is now a target of ``target_parameters``, or the reverse.
    """
    if config.alora_invocation_tokens is not None:
        raise ValueError(
            f"inject: alora_invocation_tokens is {shown(list(config.alora_invocation_tokens))}, but aLoRA is PEFT's: "
            "adapt the model by PEFT (get_peft_model, PeftModel.from_pretrained), and call "
            "lora_ext.integrations.peft.accelerate on it"
        )
    _check_kinds(bare, targets, config)
    _check_trained(bare, targets)
    _check_tokens(bare, targets)
    _check_parameters(bare, targets, config)
    _check_offloaded(bare, targets, config)


def _check_kinds(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    problems = []
    for path, module, setting in adapted_modules(bare, targets, config):
        kind = lora_layer_for(module, config, setting)
        if targets.tied.get(path) in targets.modules and not _can_follow(module, bare.modules[setting]):
            problem = (
                f"it shares the weight of {setting!r}, but only an nn.Linear or nn.Embedding can follow an embedding"
            )
            problems.append(f"{path} ({type(module).__name__}): {problem}; set ensure_weight_tying=False")
            continue
        problem = why_unsupported(module) if quantized_weight(module) is None else None
        if problem is None:
            problem = f"no LoRA layer adapts {type(module).__name__}" if kind is None else kind.why_not(module, config)
        if problem is None:
            problem = why_bypassed_at(bare, path)
        if kind is None and config.enable_lora_for(setting) is not None:
            problem = f"enable_lora names it, but supports only {LoraPackedLinear.base_kinds}"
        elif kind is None and config.use_dora and quantized_weight(module) is None:
            problem = f"use_dora supports only {DoraLinear.base_kinds}"
        if problem is None and (attention := attention_around(bare, path)) is not None:
            problem = LoraMultiheadAttention.why_not(attention, config)
            if config.use_dora:
                problem = f"use_dora supports only {DoraLinear.base_kinds}"
            if problem is None and attention is bare.root:
                problem = "it is the model itself; put it into another module"
            problem = problem and f"nn.MultiheadAttention reads its weight and never calls it, and {problem}"
        if problem:
            problems.append(f"{path} ({type(module).__name__}): {problem}")
    if problems:
        kinds = ", ".join(kind.base_kinds for kind in LORA_LAYERS)
        raise TypeError(
            f"inject: target_modules matches modules that cannot be adapted; supported are {kinds}. Narrow "
            f"target_modules, or add to exclude_modules:{listed(problems)}"
        )


def why_bypassed_at(bare: BareModel, path: str) -> str | None:
    """Returns why an adapter of the module at ``path`` would have no effect, or None if that is not known."""
    parent, _, name = path.rpartition(".")
    return why_bypassed(bare.modules[parent] if parent else bare.root, name)


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


def _can_follow(module: nn.Module, source: nn.Module) -> bool:
    """Returns whether ``module`` can have a :class:`TiedAdapter` on the adapter of ``source``."""
    return isinstance(module, nn.Linear | nn.Embedding) and isinstance(source, nn.Embedding)


def _check_tokens(bare: BareModel, targets: Targets) -> None:
    for path in (*targets.tokens, *(path for path, source in targets.tied.items() if source in targets.tokens)):
        module = bare.modules[path]
        if problem := TrainableTokens.why_not(module):
            raise TypeError(
                f"inject: trainable_token_indices cannot train rows of {path!r} ({type(module).__name__}): {problem}"
            )
        if path in targets.tokens and not targets.tokens[path]:
            raise ValueError(f"inject: trainable_token_indices names no token of {path!r}; leave it out")
        wrong = [token for token in targets.tokens.get(path, ()) if not 0 <= token < len(module.weight)]
        if wrong:
            raise ValueError(
                f"inject: trainable_token_indices names the tokens {shown(wrong)}, but {path!r} has "
                f"{len(module.weight)}; resize the embedding first (resize_token_embeddings)"
            )


def _check_parameters(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    problems = []
    for path, names in targets.parameters.items():
        for name in names:
            reason = LoraParameter.why_not_parameter(bare.modules[path], name) or why_bypassed_at(bare, path)
            if reason is not None:
                problems.append(f"{path}.{name}: {reason}")
            elif attention_around(bare, path) is not None:
                problems.append(
                    f"{path}.{name}: nn.MultiheadAttention reads it and never calls its module; name {path!r} in "
                    "target_modules"
                )
    if problems:
        raise TypeError(f"inject: target_parameters matches parameters that cannot be adapted:{listed(problems)}")

    for path in (*targets.modules, *targets.parameters):
        for layer in bare.layers.get(path, ()):
            if isinstance(layer, LoraLayer) and isinstance(layer, LoraParameter) != (path in targets.parameters):
                raise ValueError(
                    f"inject: {path!r} is adapted by {list(layer.adapters)} as a target of "
                    f"{'target_parameters' if isinstance(layer, LoraParameter) else 'target_modules'}, and cannot be a "
                    "target of the other kind too; adapt it in the same way, or delete_adapter(model, ...) first"
                )
            if isinstance(layer, LoraLayer) and isinstance(layer, DoraLinear) != config.use_dora:
                has, new = ("without", "with") if config.use_dora else ("with", "without")
                raise ValueError(
                    f"inject: {path!r} has adapters {has} use_dora already "
                    f"({list(layer.adapters) or 'those of an AdapterPool'}), and none {new} it can join them; use the "
                    "same use_dora, or remove them first (delete_adapter(model, ...), or pool.close())"
                )


def _check_offloaded(bare: BareModel, targets: Targets, config: LoraConfig) -> None:
    """Refuses to train copies of values that accelerate keeps elsewhere, and targets in modules brought as a whole."""
    inside = Parents(targets.trained)
    adapted = (*targets.modules, *targets.parameters, *targets.trained, *targets.tokens)
    for path, module in {"": bare.root, **bare.modules}.items():
        if brings_submodules(module) and (
            found := [target for target in adapted if is_inside(target, path) or not path]
        ):
            raise ValueError(
                f"inject: accelerate offloads {path!r} as a whole, with {found[0]!r} in it, and would look for the "
                "factors in the offloaded weights; offload without preload_module_classes"
            )
        if path in inside:
            key, names = "modules_to_save", tuple(module._parameters)
        else:
            key, names = "bias", () if config.bias == "none" else ("bias",)
        for name in names:
            if is_offloaded(module, name):
                raise ValueError(
                    f"inject: {key} trains the {name} of {path!r}, which is offloaded; keep it on a device (device_map)"
                )
