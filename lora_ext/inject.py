"""Replaces a model's target layers by LoRA layers, in place.

Everything that can fail happens while planning, before the model is touched; applying a plan only swaps modules and
sets ``requires_grad``. Module names match by PEFT's rules, so a PEFT user's config selects the same layers here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from ._checks import FLOATING
from .config import ALL_LINEAR, LoraConfig
from .nn import LoraAdapter, LoraLinear

ModelT = TypeVar("ModelT", bound=nn.Module)

_CONFIGS = "_lora_configs"  # attribute of an injected model: dict[adapter name, LoraConfig]


def inject(model: ModelT, config: LoraConfig, adapter_name: str = "default") -> ModelT:
    """Adapts ``model`` in place: every targeted ``nn.Linear`` becomes a :class:`~lora_ext.nn.LoraLinear`.

    All parameters are frozen but the adapters' and those of ``config.modules_to_save``. The model computes what it
    computed before until the adapters are trained. Adapters live on their base layer's device, in its dtype, or in
    float32 where that is a 16-bit one. A layer that the model holds in several places is replaced in all of them by the
    same LoRA layer; the first path names it.

    ``nn.TransformerEncoder``'s inference fast path reads its layers' weights without calling them; it is switched off
    in the encoders that hold an adapter. With it goes its habit of zeroing the outputs at padded positions.

    Reentrant gradient checkpointing passes no gradient unless its input requires one; with frozen embeddings that takes
    ``model.enable_input_require_grads()``, which recent Transformers call by themselves.

    Args:
        model: any module; weights may be on the meta device.
        config: what to adapt.
        adapter_name: the adapter's key in each layer. One adapter per model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: nothing matches ``target_modules`` or ``modules_to_save`` (names close matches), the model is
            injected already, or a module to save shares a parameter with the rest of the model.
        TypeError: a target is not a plain ``nn.Linear`` (names every such target).
        The model is then unchanged.

    Warns:
        UserWarning: an entry of ``target_modules``, ``exclude_modules`` or ``modules_to_save`` matches nothing while
            others do; or "all-linear" leaves out the ``out_proj`` of an ``nn.MultiheadAttention``.
    """
    injection = plan_injection(model, config, adapter_name)
    apply_injection(model, injection)
    return model


@dataclasses.dataclass(frozen=True)
class Injection:
    """The trainable parts of one injected model, by module path: what an adapter file holds."""

    config: LoraConfig
    adapter_name: str
    adapters: Mapping[str, LoraAdapter]
    trained: Mapping[str, nn.Module]


def plan_injection(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> Injection:
    """Finds and checks all targets and builds their adapters, without touching ``model``. Errors as :func:`inject`."""
    root = root_module(model)
    if not isinstance(config, LoraConfig):
        raise TypeError(f"inject: config is a {type(config).__name__}, want a LoraConfig")
    if not adapter_name or "." in adapter_name or hasattr(nn.ModuleDict, adapter_name):
        raise ValueError(f"inject: adapter_name is {adapter_name!r}, want a name without dots, such as 'default'")
    for path, _ in lora_modules(root):
        raise ValueError(
            f"inject: {type(root).__name__} has LoRA layers already ({path!r}); call "
            "lora_ext.adapters.merge_and_unload(model) first, or inject into a fresh model"
        )
    trained = _trained_modules(root, config)
    _check_trained(root, config, trained)
    targets = _select_targets(root, config, trained)
    adapters = {path: _build_adapter(linear, config) for path, linear in targets.items()}
    if _is_all_linear(config):
        # Like PEFT, remember the layers, not the rule: it would find others once the model has changed.
        config = dataclasses.replace(config, target_modules=tuple(targets))
    return Injection(config, adapter_name, adapters, trained)


def apply_injection(model: nn.Module, injection: Injection) -> None:
    """Carries out a plan."""
    root = root_module(model)
    layers = {root.get_submodule(path): adapter for path, adapter in injection.adapters.items()}
    replace_modules(
        root, {linear: LoraLinear(linear, adapter, injection.adapter_name) for linear, adapter in layers.items()}
    )
    root.requires_grad_(False)
    for module in (*injection.adapters.values(), *injection.trained.values()):
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point() and not injection.config.inference_mode)
    setattr(root, _CONFIGS, {injection.adapter_name: injection.config})
    _switch_off_fast_path(root)


def find_injection(model: nn.Module) -> Injection:
    """The parts of a model that was injected before.

    Raises:
        ValueError: it was not.
    """
    root = root_module(model)
    configs: dict[str, LoraConfig] = getattr(root, _CONFIGS, {})
    if not configs:
        raise ValueError(
            f"{type(root).__name__} is not injected; call lora_ext.inject on it (on this module, not on a part of it)"
        )
    ((adapter_name, config),) = configs.items()
    adapters = {path: layer.adapters[adapter_name] for path, layer in lora_modules(root)}
    return Injection(config, adapter_name, adapters, _trained_modules(root, config))


def is_injected(model: nn.Module) -> bool:
    return hasattr(root_module(model), _CONFIGS)


def forget_injection(model: nn.Module) -> None:
    """Clears what :func:`apply_injection` left on ``model`` beside the LoRA layers themselves."""
    for module in model.modules():
        vars(module).pop(_CONFIGS, None)
        _restore_fast_path(module)


def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """``(path, layer)`` of every LoRA layer in ``model``, each layer once."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def root_module(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` wrapped, or ``model``: paths and files must not depend on compilation."""
    return getattr(model, "_orig_mod", model)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Swaps each key for its value wherever ``model`` holds it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])


def parameter_paths(model: nn.Module) -> dict[int, list[str]]:
    """``id(parameter)`` -> the paths of the modules that hold it; a module in several places counts once."""
    paths: dict[int, list[str]] = defaultdict(list)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                paths[id(parameter)].append(path)
    return paths


# --- matching names ---------------------------------------------------------------------------------------------------


def _is_all_linear(config: LoraConfig) -> bool:
    return isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR


def _matches(names: Iterable[str] | str | None, path: str) -> bool:
    """Whether names (a whole path, or its end after a dot) or a regular expression (a whole path) cover ``path``."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names or ())


def _is_inside(path: str, parents: Iterable[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


def _trained_modules(root: nn.Module, config: LoraConfig) -> dict[str, nn.Module]:
    """Modules to train in full: those whose path ends with an entry, dot or not (PEFT's rule)."""
    lora_paths = [path for path, _ in lora_modules(root)]
    return {
        path: module
        for path, module in root.named_modules()
        if path.endswith(config.trained_modules) and not _is_inside(path, lora_paths)
    }


def _check_trained(root: nn.Module, config: LoraConfig, trained: Mapping[str, nn.Module]) -> None:
    # The heads that a task adds (and PEFT writes into the file) are not the user's to get right.
    names = set(config.modules_to_save or ()) - set(config.task_heads)
    unmatched = sorted(name for name in names if not any(path.endswith(name) for path in trained))
    _report_unmatched(root, "modules_to_save", unmatched, fatal=not trained)

    paths = parameter_paths(root)
    for path, module in trained.items():
        for parameter in module.parameters():
            for other in paths[id(parameter)]:
                # It would train, and on loading overwrite, its twin too; PEFT would untie the two.
                if not _is_inside(other, trained):
                    raise ValueError(
                        f"inject: modules_to_save has {path!r}, whose parameter is also that of {other!r}; "
                        f"add {other!r} to modules_to_save, or untie the two"
                    )


def _select_targets(root: nn.Module, config: LoraConfig, trained: Mapping[str, nn.Module]) -> dict[str, nn.Linear]:
    """The layers to adapt, by path; checked, at least one."""
    modules = {path: module for path, module in root.named_modules() if path}
    weight_only = {id(m.out_proj) for m in modules.values() if isinstance(m, nn.MultiheadAttention)}
    if _is_all_linear(config):
        matched = _all_linear(root, modules)
        skipped = [path for path in matched if id(modules[path]) in weight_only]
        matched = [path for path in matched if path not in skipped]
        if skipped:
            warnings.warn(
                f'inject: "all-linear" leaves out {skipped}: nn.MultiheadAttention reads the weight of its out_proj '
                "and never calls it, so an adapter there would do nothing",
                stacklevel=4,
            )
    else:
        matched = [path for path in modules if _matches(config.target_modules, path)]
        unmatched = _unmatched(config.target_modules, modules)
        _report_unmatched(root, "target_modules", unmatched, fatal=not matched)
    _report_unmatched(root, "exclude_modules", _unmatched(config.exclude_modules, modules), fatal=False)

    targets = {
        path: modules[path]
        for path in matched
        if not _matches(config.exclude_modules, path) and not _is_inside(path, trained)
    }
    if not targets:
        raise ValueError(
            f"inject: nothing is left to adapt in {type(root).__name__}: target_modules matches {matched}, and "
            "exclude_modules or modules_to_save takes all of that out"
            if matched
            else f"inject: {type(root).__name__} has no linear layer to adapt beside its output head"
        )

    problems = [
        f"{path} ({type(module).__name__}): {problem}"
        for path, module in targets.items()
        if (problem := _why_unsupported(module, id(module) in weight_only))
    ]
    if problems:
        raise TypeError(
            "inject: target_modules matches what cannot be adapted; only nn.Linear can. Narrow target_modules, or add "
            "to exclude_modules:\n  " + "\n  ".join(problems)
        )
    return targets


def _all_linear(root: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head of a Hugging Face model. Conv1D is one too, and refused later."""
    get_head = getattr(root, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    return [
        path
        for path, module in modules.items()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module is not head
    ]


def _unmatched(names: tuple[str, ...] | str | None, paths: Iterable[str]) -> list[str]:
    """The entries of a list, or the regular expression, that cover no path."""
    if isinstance(names, str):
        return [] if any(_matches(names, path) for path in paths) else [names]
    return [name for name in names or () if not any(_matches((name,), path) for path in paths)]


def _report_unmatched(root: nn.Module, key: str, unmatched: list[str], *, fatal: bool) -> None:
    """Raises, or only warns where other entries match: PEFT is silent then, and a misspelt layer stays unadapted."""
    if not unmatched:
        return
    modules = {path: module for path, module in root.named_modules() if path}
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    ends = list(dict.fromkeys(path.rpartition(".")[2] for path in (*linear, *modules)))
    close = dict.fromkeys(match for name in unmatched for match in difflib.get_close_matches(name, [*ends, *linear]))
    some = list(dict.fromkeys(path.rpartition(".")[2] for path in linear))[:8]
    message = (
        f"inject: {key} {unmatched} matches no module of {type(root).__name__}; "
        + (f"close matches: {', '.join(map(repr, close))}; " if close else "")
        + f"its linear layers include {', '.join(map(repr, some)) or 'none'}"
    )
    if fatal:
        raise ValueError(message)
    warnings.warn(message, stacklevel=5)


def _why_unsupported(module: nn.Module, weight_only: bool) -> str | None:
    """Why a LoRA layer, which reads the weight and bias of ``module`` but does not call it, would be wrong; or None."""
    if weight_only:
        return "nn.MultiheadAttention reads its weight and never calls it, so an adapter would do nothing; exclude it"
    if not isinstance(module, nn.Linear):
        return "not an nn.Linear"
    if type(module).forward is not nn.Linear.forward or "forward" in vars(module):
        return "its forward is not nn.Linear's"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is computed by a parametrization; remove that first"
    if torch.nn.parameter.is_lazy(weight):
        return "its weight is not initialised yet; run the model once first"
    if weight.dtype not in FLOATING:
        return f"its weight is {weight.dtype}, want one of {', '.join(map(str, FLOATING))}"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks, which would no longer run; remove them first"
    return None


def _build_adapter(linear: nn.Linear, config: LoraConfig) -> LoraAdapter:
    dtype = linear.weight.dtype
    return LoraAdapter(
        linear.in_features,
        linear.out_features,
        config.r,
        config.lora_alpha,
        config.lora_dropout,
        config.use_rslora,
        config.init_lora_weights,
        dtype=torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype,
        device=linear.weight.device,
    )


# --- nn.TransformerEncoder's fast path --------------------------------------------------------------------------------

# In eval mode these modules pass linear1.weight and linear2.weight to one fused kernel, unless this attribute is off.
_FAST_PATH: tuple[tuple[type[nn.Module], str, int | bool], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only that kernel takes the nested tensors it makes
)


def _switch_off_fast_path(root: nn.Module) -> None:
    for module in root.modules():
        for kind, attribute, off in _FAST_PATH:
            if isinstance(module, kind) and any(lora_modules(module)):
                setattr(module, f"_{attribute}_before_lora", getattr(module, attribute))
                setattr(module, attribute, off)


def _restore_fast_path(module: nn.Module) -> None:
    for _, attribute, _ in _FAST_PATH:
        if (before := vars(module).pop(f"_{attribute}_before_lora", None)) is not None:
            setattr(module, attribute, before)
