"""Adapts a model in place: replaces its target layers by layers that hold adapters.

Everything that can fail happens before the model changes; :func:`apply_injection` then only swaps modules and sets
``requires_grad``. lora_ext/injection/targets.py finds the layers that a config names, by PEFT's rules;
lora_ext/injection/check_targets.py refuses what cannot be adapted, lora_ext/injection/build.py makes the new layers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.sharded import gathered, prepare_shards
from lora_ext._common.wrapped import COMPILED
from lora_ext.config import LoraConfig, PeftConfig
from lora_ext.injection.all_linear import expand_all_linear, is_all_linear, warn_of_parts_left_out
from lora_ext.injection.build import PartsBuilder
from lora_ext.injection.check_targets import check_targets
from lora_ext.injection.targets import find_targets
from lora_ext.injection.trainers import guard_against_trainers, remove_guard
from lora_ext.model.adapter_set import Adapter, AdapterSet, adapter_set, attach_adapter_set, forget_adapter_set
from lora_ext.model.bare_model import BareModel, adapter_layers, check_not_managed, check_not_parallel, root_module
from lora_ext.model.mixed_batch import forget_adapter_names, refuse_adapter_names, serve_adapter_names
from lora_ext.model.saver import savers, serve_files, stop_serving_files
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
    in its dtype, or in float32 if that has 16 bits. A layer in several places of the model is replaced in all of them
    by one new layer, named by the first path. ``nn.TransformerEncoder``'s inference fast path is switched off: it reads
    weights without calling their layers.

    Another call with another name adds a second adapter, on the same or on other layers, and makes it the active one;
    :func:`lora_ext.adapters.set_adapter` switches back.

    Args:
        model: any module; weights may be on the meta device.
        config: what to adapt; a ``peft.LoraConfig`` is converted (:meth:`LoraConfig.from_peft`).
        adapter_name: the adapter's name in the model.
        share_inputs: compute layers that read one tensor (q/k/v, gate/up) in one op, with one dropout mask
            (:func:`lora_ext.adapters.input_groups` reports them). Concerns all layers of the model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: a setting matches nothing (close matches are named) or does not go together with another one, an
            adapter or the state of the model, such as merged adapters or a wrapper of ``DistributedDataParallel``.
        TypeError: targets of unsupported kinds (all are named).
        The model is then unchanged.

    Warns:
        UserWarning: an entry matches nothing while others do; the trained copy of a module in ``modules_to_save`` no
            longer shares a parameter with the rest of the model; or "all-linear" leaves out parts of the model.
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

    def build(self) -> Adapter:
        """Builds the initialised adapter."""
        return self._adapter(PartsBuilder(self._bare, self._config, self._into))

    def build_without_memory(self) -> tuple[Adapter, Callable[[], Adapter]]:
        """Builds the adapter on the meta device (shapes only), and returns it with a function that allocates memory.

        That function returns the adapter on the base layers' devices; low-rank factors are uninitialised.
        """
        builder = PartsBuilder(self._bare, self._config, self._into, torch.device("meta"))
        adapter = self._adapter(builder)

        def give_memory() -> Adapter:
            with torch.inference_mode(False):
                builder.give_memory()  # low-rank factors, in place; copies of modules and rows are made again below
            return self._adapter(builder) if self._targets.trained or self._targets.tokens else adapter

        return adapter, give_memory

    def _adapter(self, builder: PartsBuilder) -> Adapter:
        with torch.inference_mode(False):  # autograd would refuse parameters that are made there, also later
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
    _switch_off_fast_path(root)
    prepare_quantized(root)
    guard_against_trainers(root)
    serve_adapter_names(root, adapters)
    serve_files(root)
    for module in savers(root):
        refuse_adapter_names(root, module)


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
    release_quantized(model)
    for module in model.modules():
        forget_adapter_set(module)
        forget_adapter_names(module)
        _restore(module, *(attribute for _, attribute, _ in _FAST_PATH))
        remove_guard(module)
    stop_serving_files(root_module(model))


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
        remove = (
            "unload(model)" if caller == "inject" and len(adapters.configs) == 1 else f"delete_adapter(model, {name!r})"
        )
        raise ValueError(
            f"{caller}: adapter {name!r} exists already; the adapters are {sorted(adapters.configs)}. Choose another "
            f"name, or {remove} first (lora_ext.adapters)"
        )


def check_none_merged(caller: str, root: nn.Module) -> None:
    """Raises a ValueError if adapters are merged into a layer: a new one becomes active and would come on top."""
    for path, layer in lora_modules(root):
        if layer.is_merged:
            raise ValueError(f"{caller}: adapters are merged into {path!r}; call unmerge(model) first")


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
    check_none_merged("inject", root)
    if adapters is not None and adapters.biases and config.bias != "none":
        (owner,) = adapters.biases
        raise ValueError(
            f"inject: bias is {config.bias!r}, but the adapter {owner!r} trains the model's biases already; use "
            'bias="none", or lora_bias=True, a bias per adapter'
        )


# --- attributes of modules --------------------------------------------------------------------------------------------

# In eval mode these modules pass linear1.weight and linear2.weight to a fused kernel, unless this attribute is off.
_FAST_PATH: tuple[tuple[type[nn.Module], str, int | bool], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),  # only the fused kernel takes nested tensors
)
_QUANTIZED = "is_quantized"
_BEFORE = "_{}_before_lora"  # the attribute that keeps another one's value


def _change(module: nn.Module, attribute: str, value: int | bool) -> None:
    vars(module).setdefault(_BEFORE.format(attribute), getattr(module, attribute))
    setattr(module, attribute, value)


def _restore(module: nn.Module, *attributes: str) -> None:
    for attribute in attributes:
        if _BEFORE.format(attribute) in vars(module):
            setattr(module, attribute, vars(module).pop(_BEFORE.format(attribute)))


def _switch_off_fast_path(root: nn.Module) -> None:
    for module in root.modules():
        for kind, attribute, off in _FAST_PATH:
            if isinstance(module, kind) and any(adapter_layers(module)):
                _change(module, attribute, off)


def prepare_quantized(model: nn.Module) -> None:
    """Keeps the quantised layers of ``model`` from rewriting their weights in calls, and makes trainers accept it.

    Transformers' Trainer refuses a model that is marked as quantised unless PEFT adapts it: the mark is taken off.
    """
    keep_stored(model)
    for module in model.modules():
        if vars(module).get(_QUANTIZED) is True:
            _change(module, _QUANTIZED, False)


def release_quantized(model: nn.Module) -> None:
    """Undoes :func:`prepare_quantized`."""
    stop_keeping_stored(model)
    for module in model.modules():
        _restore(module, _QUANTIZED)
