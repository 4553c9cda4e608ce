"""Adapts a model in place: replaces its target layers by layers that hold adapters.

Everything that can fail happens before the model changes; :func:`apply_injection` then only swaps modules and sets
``requires_grad``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.messages import first_of
from lora_ext._common.modules import COMPILED
from lora_ext._common.sharded import gathered, prepare_shards
from lora_ext.config import LoraConfig, PeftConfig
from lora_ext.injection.all_linear import expand_all_linear, is_all_linear, warn_of_parts_left_out
from lora_ext.injection.build import PartsBuilder
from lora_ext.injection.check_targets import check_targets
from lora_ext.injection.targets import find_targets
from lora_ext.injection.trainers import guard_against_trainers
from lora_ext.model.adapter_set import Adapter, AdapterSet, adapter_set, attach_adapter_set, forget_adapter_set
from lora_ext.model.bare_model import BareModel, adapter_layers, check_not_managed, check_not_parallel, root_module
from lora_ext.model.mixed_batch import forget_adapter_names, serve_adapter_names
from lora_ext.model.replaced_methods import put_back, replace_attribute, savers, serve_files
from lora_ext.nn import LoraLayer, LoraLinear
from lora_ext.nn.adapter_layer import check_adapter_name, is_of_peft
from lora_ext.nn.input_groups import form_input_groups
from lora_ext.nn.linear import is_linear
from lora_ext.quantized import keep_stored, stop_keeping_stored

ModelT = TypeVar("ModelT", bound=nn.Module)


@checked
@one_at_a_time
def inject(
    model: ModelT, config: LoraConfig | PeftConfig, adapter_name: str = "default", *, share_inputs: bool = True
) -> ModelT:
    """Adapts ``model`` in place: replaces every targeted layer by one that holds a low-rank adapter.

    Targets can be linear layers (also quantised ones), embeddings, convolutions, attention and single parameters. The
    first call freezes all parameters; trainable are those of the adapter, ``config.modules_to_save`` and
    ``config.bias``. The output stays the same until the adapter is trained. An adapter is on its base layer's device,
    in its dtype, or in float32 if that has 16 bits. A layer in several places of the model is replaced in all of them.
    Another call with another name adds a second adapter, and makes it the active one.

    Args:
        model: any module; weights may be on the meta device.
        config: what to adapt; a ``peft.LoraConfig`` is converted (:meth:`LoraConfig.from_peft`).
        adapter_name: the adapter's name in the model.
        share_inputs: compute layers that read one tensor (q/k/v, gate/up) in one op, with one dropout mask
            (:func:`lora_ext.adapters.input_groups` reports them). Concerns all layers of the model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError, RuntimeError: a setting matches nothing, or does not go together with another one or the state of
            the model.
        TypeError: targets of unsupported kinds (all are named). After an error the model is unchanged.

    Warns:
        UserWarning: an entry matches nothing while others do; a trained copy (``modules_to_save``) no longer shares a
            parameter with the rest of the model; or "all-linear" leaves out parts of it.
    """
    if not isinstance(config, LoraConfig):
        config = LoraConfig.from_peft(config)
    injection = Injection(model, config, adapter_name)
    with injection.values_gathered():
        adapter = injection.build()
        adapter.into.share_inputs = share_inputs
        apply_injection(model, adapter)
    return model


class Injection:
    """The targets of an injection into ``model``, found and checked; nothing is built. Errors are those of inject."""

    def __init__(self, model: nn.Module, config: LoraConfig, adapter_name: str) -> None:
        check_not_parallel("inject", model)
        check_not_managed("inject", model, "inject before deepspeed.initialize (before Trainer.train)")
        prepare_shards("inject", model)
        root, adapters = root_module(model), adapter_set(model)
        check_new_name("inject", adapter_name, adapters)
        _check_state(root, adapters, config)

        self._bare, self._name = BareModel(root), adapter_name
        self._config = expand_all_linear(config, self._bare)
        self._targets = find_targets(self._config, self._bare)
        with self.values_gathered():
            check_targets(self._bare, self._targets, self._config)
        if is_all_linear(config):
            warn_of_parts_left_out(config, self._bare, self._targets)
            # Like PEFT, store the layers, not the rule: it would find other layers after the model changes.
            self._config = dataclasses.replace(self._config, target_modules=tuple(self._targets.modules))
        self._into = AdapterSet() if adapters is None else adapters

    def values_gathered(self) -> AbstractContextManager[None]:
        """Gathers the values that are copied, or may be read, if ZeRO-3 partitioned them as they were loaded.

        The weights of linear layers and embeddings stay partitioned: only their shapes are read.
        """
        targets, modules = self._targets, self._bare.modules
        read = {path for path, m in targets.modules.items() if not (is_linear(m) or isinstance(m, nn.Embedding))}
        read |= {*targets.parameters, *targets.trained, *targets.tokens, *targets.tied}
        parameters = [parameter for path in read for parameter in modules[path].parameters()]
        if self._config.bias != "none":
            parameters += [bias for module in modules.values() if (bias := module._parameters.get("bias")) is not None]
        return gathered(parameters)

    def build(self, device: torch.device | None = None) -> Adapter:
        """Builds the initialised adapter; low-rank factors on ``device``, or where their base layers are."""
        with torch.inference_mode(False):  # autograd would refuse parameters that are made there, also later
            builder = PartsBuilder(self._bare, self._config, self._into, device)
            parts = builder.parts(self._targets)
            return Adapter(self._name, self._config, self._into, parts, builder.biases(parts))


def apply_injection(model: nn.Module, adapter: Adapter, activate: bool = True) -> None:
    """Attaches a prepared adapter, and makes it the active one or leaves it frozen."""
    attach_layers(model, adapter)
    for part in adapter.parts:
        part.layer.add_adapter(adapter.name, part.adapter)
    adapter.into.add(adapter)
    if activate:
        adapter.into.switch((adapter.name,))
    serve_adapters(model, adapter.into)


def attach_layers(model: nn.Module, adapter: Adapter) -> None:
    """Puts the layers of a prepared adapter into the model, without the adapter."""
    root = root_module(model)
    replace_modules(root, {old: new for part in adapter.parts for old, new in part.replaced.items()})
    if adapter_set(model) is None:
        root.requires_grad_(False)
        attach_adapter_set(model, adapter.into)


def serve_adapters(model: nn.Module, adapters: AdapterSet) -> None:
    """Sets what a model needs whose layers have changed: groups of layers, hooks, and methods in place of its own."""
    root = root_module(model)
    form_input_groups(root, adapters.share_inputs, (LoraLinear,))
    prepare_modules(root)
    guard_against_trainers(root)
    serve_files(root)
    serve_adapter_names(root, savers(root))


def remove_empty_layers(model: nn.Module, adapters: AdapterSet) -> None:
    """Replaces layers without adapters by their base layers. A model without any is as it was before injection."""
    empty = {layer: layer.base_layer for _, layer in adapter_layers(model) if not layer.is_needed}
    while empty:  # layers may be nested
        replace_modules(root_module(model), empty)
        held = {layer for _, layer in adapter_layers(model)}
        empty = {layer: base for layer, base in empty.items() if layer in held}
    if not adapters.configs and adapters.pool is None:
        forget_injection(model)


def forget_injection(model: nn.Module) -> None:
    """Removes the attributes and hooks that :func:`apply_injection` set on the modules of ``model``."""
    for module in model.modules():
        forget_adapter_set(module)
        forget_adapter_names(module)
    release_modules(model)


@checked
def lora_modules(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yields ``(path, layer)`` of every LoRA layer in ``model``, each layer once."""
    for path, layer in adapter_layers(model):
        if isinstance(layer, LoraLayer):
            yield path, layer


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces each key by its value everywhere in ``model``."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements and replacements[child] is not parent:
                setattr(parent, name, replacements[child])
                if name == COMPILED:  # torch.compile's wrapper still calls the old one, until it is made again
                    parent.__setstate__(parent.__getstate__())


def check_new_name(caller: str, name: str, adapters: AdapterSet | None) -> None:
    """Checks the name of a new adapter. ValueError: it is taken or invalid."""
    check_adapter_name(caller, name)
    if adapters is not None and name in adapters.configs:
        raise ValueError(
            f"{caller}: adapter {name!r} exists already; the adapters are {sorted(adapters.configs)}. Choose another "
            f"name, or delete_adapter(model, {name!r}) or unload(model) first (lora_ext.adapters)"
        )


def check_unmerged(caller: str, model: nn.Module, name: str | None = None) -> None:
    """Raises a RuntimeError if adapter ``name``, or for None any, is merged into a layer of ``model``."""
    merged = [
        repr(path)
        for path, layer in lora_modules(model)
        if (layer.is_merged if name is None else name in layer.merged_adapters)
    ]
    if merged:
        what, unmerge = ("adapters are", "") if name is None else (f"{name!r} is", f", {name!r}")
        raise RuntimeError(f"{caller}: {what} merged into {first_of(merged)}; call unmerge(model{unmerge}) first")


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_state(root: nn.Module, adapters: AdapterSet | None, config: LoraConfig) -> None:
    if adapters is not None:
        adapters.check_enabled("inject")
    for path, module in root.named_modules():
        if is_of_peft(module):  # its factors would be targets, and frozen
            raise ValueError(
                f"inject: {path!r} is a layer of PEFT ({type(module).__name__}); merge or remove PEFT's adapters first "
                "(peft_model.merge_and_unload()), or run PEFT's layers on lora_ext's kernels: "
                "lora_ext.integrations.peft.accelerate(peft_model)"
            )
        if adapters is None and isinstance(module, LoraLayer):
            raise ValueError(
                f"inject: {type(root).__name__} has LoRA layers already ({path!r}), but was not injected as a whole; "
                "call lora_ext.adapters.merge_and_unload(model) first, or inject into a fresh model"
            )
    check_unmerged("inject", root)  # a new adapter becomes active and would come on top
    if adapters is not None and adapters.biases and config.bias != "none":
        (owner,) = adapters.biases
        raise ValueError(
            f"inject: bias is {config.bias!r}, but the adapter {owner!r} trains the model's biases already; use "
            'bias="none", or lora_bias=True, a bias per adapter'
        )


# --- attributes of modules --------------------------------------------------------------------------------------------

# Attributes that are off while a model has adapters. In eval mode PyTorch's encoder passes weights to a fused kernel,
# without calling their layers. Transformers' Trainer refuses a model that is marked as quantised unless PEFT adapts it.
_OFF: tuple[tuple[type[nn.Module], str, int | bool], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only the fused kernel takes nested tensors
    (nn.Module, "is_quantized", False),
)


def prepare_modules(model: nn.Module) -> None:
    """Switches off what bypasses adapters or refuses them, and keeps quantised layers from rewriting their weights."""
    keep_stored(model)
    for module in model.modules():
        for kind, attribute, off in _OFF:
            is_on = isinstance(module, kind) and bool(getattr(module, attribute, False))
            if is_on and (kind is nn.Module or any(adapter_layers(module))):
                replace_attribute(module, attribute, off)


def release_modules(model: nn.Module) -> None:
    """Undoes :func:`prepare_modules`, and puts back all that was replaced, unless a method is still applied."""
    stop_keeping_stored(model)
    put_back(root_module(model))
