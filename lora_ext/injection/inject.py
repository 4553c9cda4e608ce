"""Adapts a model in place: replaces its target layers by layers that hold adapters.

Everything that can fail happens before the model changes (``build``); :func:`apply_injection` then only swaps modules
and sets ``requires_grad``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.modules import COMPILED
from lora_ext.config import LoraConfig, PeftConfig
from lora_ext.injection.build import Injection
from lora_ext.injection.trainers import guard_against_trainers
from lora_ext.model.adapter_set import Adapter, AdapterSet, adapter_set, attach_adapter_set, forget_adapter_set
from lora_ext.model.bare_model import adapter_layers, root_module
from lora_ext.model.mixed_batch import forget_adapter_names, serve_adapter_names
from lora_ext.model.replaced_methods import put_back, replace_attribute, savers, serve_files
from lora_ext.nn import LoraLayer, LoraLinear
from lora_ext.nn.input_groups import form_input_groups
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
