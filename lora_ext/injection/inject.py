"""Adapts a model in place: its target layers are replaced by layers that hold adapters.

Everything that can fail happens before the model is touched; :func:`apply_injection` then only swaps modules and
sets ``requires_grad``. lora_ext/injection/targets.py has the rules by which a config names layers, which are PEFT's;
lora_ext/injection/build.py makes the new layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import changing, one_at_a_time
from lora_ext.adapters.adapter_set import Adapter, AdapterSet, adapter_set, attach_adapter_set, forget_adapter_set
from lora_ext.config import LoraConfig
from lora_ext.injection.bare_model import BareModel, adapter_layers, root_module
from lora_ext.injection.build import PartsBuilder, check_targets
from lora_ext.injection.targets import find_targets, is_all_linear
from lora_ext.nn import LoraLayer
from lora_ext.nn.layer import check_adapter_name

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def inject(model: ModelT, config: LoraConfig, adapter_name: str = "default") -> ModelT:
    """Adapts ``model`` in place: every targeted layer becomes one that holds a low-rank adapter.

    Linear layers, embeddings, convolutions, attention and single parameters can be targets: lora_ext/nn has a module
    for each. The first call freezes all parameters; trainable are the adapter's, and those of
    ``config.modules_to_save`` and ``config.bias``. The model computes what it computed before until the adapter is
    trained. Adapters live on their base layer's device, in its dtype, or in float32 where that is a 16-bit one. A layer
    that the model holds in several places is replaced in all of them by the same one; the first path names it.

    With ``config.ensure_weight_tying``, modules that share the input embedding's weight have one adapter with it: both
    compute with the same updated weight, and merging changes it once. Without, each named module has an adapter of its
    own, and merging a weight that is in another module too is refused.

    Called again with another name, it adds another adapter, on the same or on other layers, and makes it the active
    one; :func:`lora_ext.adapters.set_adapter` switches back.

    ``nn.TransformerEncoder``'s inference fast path reads its layers' weights without calling them; it is switched off
    in the encoders that hold an adapter. With it goes its habit of zeroing the outputs at padded positions.

    Reentrant gradient checkpointing passes no gradient unless its input requires one; with frozen embeddings that takes
    ``model.enable_input_require_grads()``, which recent Transformers call by themselves.

    Args:
        model: any module; weights may be on the meta device.
        config: what to adapt.
        adapter_name: the adapter's name in the model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: nothing matches ``target_modules`` or ``modules_to_save`` (names close matches), the model has an
            adapter of that name, adapters are merged, a module to save shares a parameter with the rest of the model,
            a second adapter would train biases, or a token whose row is to be trained does not exist.
        TypeError: a target is not of a kind that can be adapted (names every such target).
        ValueError: another adapter has a module as one of ``target_modules`` that this one has in
            ``target_parameters``, or the other way round.
        The model is then unchanged.

    Warns:
        UserWarning: an entry of ``target_modules``, ``exclude_modules`` or ``modules_to_save`` matches nothing while
            others do.
    """
    apply_injection(model, Injection(model, config, adapter_name).build())
    return model


def prepare_injection(model: nn.Module, config: LoraConfig, adapter_name: str = "default") -> Adapter:
    """Finds and checks all targets and builds the adapter, without touching ``model``. Errors as :func:`inject`."""
    return Injection(model, config, adapter_name).build()


class Injection:
    """What is to be adapted in ``model``, found and checked; nothing is built yet. Errors as :func:`inject`."""

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        root, adapters = root_module(model), adapter_set(model)
        check_new_name("inject", adapter_name, adapters)
        _check_state(root, adapters, config)

        self._bare = BareModel(root)
        self._targets = find_targets(
            config, type(root).__name__, self._bare.modules, self._bare.head, self._bare.embedding
        )
        check_targets(self._bare, self._targets, config)
        if is_all_linear(config):
            # Like PEFT, remember the layers, not the rule: it would find others once the model has changed.
            config = dataclasses.replace(config, target_modules=tuple(self._targets.modules))
        self._config, self._name = config, adapter_name
        self._into = AdapterSet() if adapters is None else adapters

    def build(self) -> Adapter:
        """The adapter, as it is before training."""
        return self._adapter(PartsBuilder(self._bare, self._config, self._into))

    def build_without_memory(self) -> tuple[Adapter, Callable[[], Adapter]]:
        """The adapter with its tensors on the meta device, which has shapes only; and what gives them memory.

        That returns the adapter where the base layers are. The values of low-rank factors are whatever the memory held.
        """
        builder = PartsBuilder(self._bare, self._config, self._into, torch.device("meta"))
        adapter = self._adapter(builder)

        def give_memory() -> Adapter:
            builder.give_memory()  # in place; copies of modules and rows are made again
            return self._adapter(builder) if self._targets.trained or self._targets.tokens else adapter

        return adapter, give_memory

    def _adapter(self, builder: PartsBuilder) -> Adapter:
        parts = builder.parts(self._targets)
        return Adapter(self._name, self._config, self._into, parts, builder.biases(parts))


def apply_injection(model: nn.Module, adapter: Adapter) -> None:
    """Attaches a prepared adapter and makes it active. Ctrl-C waits until that is done."""
    root = root_module(model)
    with changing(adapter.into.active):
        replace_modules(root, {old: new for part in adapter.parts for old, new in part.replaced.items()})
        if adapter_set(model) is None:
            root.requires_grad_(False)
            attach_adapter_set(model, adapter.into)
        for part in adapter.parts:
            part.layer.add_adapter(adapter.name, part.adapter)
        adapter.into.add(adapter)
        adapter.into.switch((adapter.name,))
        _switch_off_fast_path(root)


def forget_injection(model: nn.Module) -> None:
    """Clears what :func:`apply_injection` left on ``model`` beside the layers themselves."""
    for module in model.modules():
        forget_adapter_set(module)
        _restore_fast_path(module)


@checked
def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """``(path, layer)`` of every LoRA layer in ``model``, each layer once."""
    for path, layer in adapter_layers(model):
        if isinstance(layer, LoraLayer):
            yield path, layer


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Swaps each key for its value wherever ``model`` holds it."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements and replacements[child] is not parent:
                setattr(parent, name, replacements[child])


def check_new_name(caller: str, name: str, adapters: AdapterSet | None) -> None:
    """A name for a new adapter: ValueError if it is taken, or cannot be one."""
    check_adapter_name(caller, name)
    if adapters is not None and name in adapters.configs:
        raise ValueError(
            f"{caller}: there is an adapter {name!r} already; the adapters are {sorted(adapters.configs)}. Choose "
            "another name, or delete_adapter(model, ...) first"
        )


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_state(root: nn.Module, adapters: AdapterSet | None, config: LoraConfig) -> None:
    if adapters is not None:
        adapters.check_enabled("inject")
    for path, layer in lora_modules(root):
        if adapters is None:
            raise ValueError(
                f"inject: {type(root).__name__} has LoRA layers already ({path!r}), which were not injected into it as "
                "a whole; call lora_ext.adapters.merge_and_unload(model) first, or inject into a fresh model"
            )
        if layer.is_merged:
            raise ValueError(f"inject: adapters are merged into {path!r}; call unmerge(model) first")
    if adapters is not None and adapters.biases and config.bias != "none":
        (owner,) = adapters.biases
        raise ValueError(
            f"inject: bias is {config.bias!r}, but the adapter {owner!r} trains the model's biases; only one can. Use "
            'bias="none", or lora_bias=True, which every adapter has of its own'
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
            kept = f"_{attribute}_before_lora"
            if isinstance(module, kind) and kept not in vars(module) and any(adapter_layers(module)):
                setattr(module, kept, getattr(module, attribute))
                setattr(module, attribute, off)


def _restore_fast_path(module: nn.Module) -> None:
    for _, attribute, _ in _FAST_PATH:
        if (before := vars(module).pop(f"_{attribute}_before_lora", None)) is not None:
            setattr(module, attribute, before)
