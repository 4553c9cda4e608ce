"""Applying a method to a model, taking it out again, and what of the model is then trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.interrupts import uninterrupted
from lora_ext.adapters.adapter_set import Adapter, adapter_set
from lora_ext.injection.bare_model import BareModel, root_module
from lora_ext.injection.inject import apply_injection, prepare_injection
from lora_ext.merging.model import unload
from lora_ext.methods.base import Method, head_paths
from lora_ext.methods.inserted import Inserted, Insertion, insert, remove_inserted

ModelT = TypeVar("ModelT", bound=nn.Module)

_ATTRIBUTE = "_adaptation_method"  # of the root


@checked
@one_at_a_time
def apply_method(model: ModelT, method: Method) -> ModelT:
    """Adapts ``model`` in place: freezes it but for what ``method`` trains, and inserts what it inserts.

    A new head (the classifier of a Transformers model for classification) is trained along. The model computes what it
    computed before, until it is trained; only tokens and activations put beside the input act at once.

    Args:
        model: not adapted yet; for methods that insert something, a Transformers model of a type that the message of
            the TypeError lists.
        method: see :func:`new_method`.

    Returns:
        ``model``, the same object.

    Raises:
        TypeError: the method does not know the architecture, or the model has nothing for it to train.
        ValueError: the model is adapted already, or an option does not go with it.
        The model is then unchanged.
    """
    carry_out(model, method, *prepare_method(model, method))
    return model


@checked
def prepare_method(model: nn.Module, method: Method) -> tuple[list[Insertion], Adapter | None]:
    """What :func:`apply_method` will put into ``model``, and raises what that does; ``model`` is not changed."""
    check_is_bare(model, "apply_method")
    insertions = method.insertions(model)
    method.trained_parameters(BareModel(root_module(model)))
    config = method.lora_config(model)
    adapter = None if config is None else prepare_injection(model, config)
    _check_apart(method, insertions, adapter)
    return insertions, adapter


def _check_apart(method: Method, insertions: list[Insertion], adapter: Adapter | None) -> None:
    """ValueError: two modules would be inserted as one, or one into a module that another takes the place of."""
    places = [(each.path, each.name) for each in insertions]
    if twice := [path for path, name in places if places.count((path, name)) > 1]:
        raise ValueError(f"{method.name}: its methods would both put a module at {twice[0]!r}; choose one of them")
    replaced = {old for part in adapter.parts for old in part.replaced} if adapter is not None else set()
    inside = {module for old in replaced for module in old.modules()}
    if lost := [each.path for each in insertions if each.host in inside]:
        raise ValueError(
            f"{method.name}: {lost[0]!r} is to hold a module of the method, but the low-rank adapter replaces it; "
            "leave it out of target_modules and modules_to_save"
        )


def carry_out(model: nn.Module, method: Method, insertions: list[Insertion], adapter: Adapter | None = None) -> None:
    """Does what was planned. Without ``adapter`` the model has its low-rank adapter already, or is to have none."""
    root = root_module(model)
    with uninterrupted():
        if adapter is not None:
            apply_injection(model, adapter)
        elif adapter_set(model) is None:
            root.requires_grad_(False)
        for insertion in insertions:
            insert(insertion)
        setattr(root, _ATTRIBUTE, method)
        for parameter in own_parameters(model).values():
            parameter.requires_grad_(True)


@checked
def method_of(model: nn.Module) -> Method | None:
    """The method that was applied to ``model``; None: none."""
    return getattr(root_module(model), _ATTRIBUTE, None)


def applied_method(model: nn.Module, caller: str) -> Method:
    """The same; ValueError: none was applied."""
    method = method_of(model)
    if method is None:
        raise ValueError(f"{caller}: {type(root_module(model)).__name__} is not adapted; call apply_method(model, ...)")
    return method


@checked
@one_at_a_time
def remove_method(model: ModelT) -> ModelT:
    """Takes out what :func:`apply_method` put in. What was trained in place (biases, a head, all) stays as trained.

    All parameters are then trainable, as in a new model.

    Returns:
        ``model``, the same object.

    Raises:
        ValueError: no method was applied.
        RuntimeError: a low-rank adapter is merged. Nothing is changed.
    """
    applied_method(model, "remove_method")
    if adapter_set(model) is not None:
        unload(model)
    with uninterrupted():
        remove_inserted(root_module(model))
        delattr(root_module(model), _ATTRIBUTE)
        for parameter in model.parameters():
            if parameter.is_floating_point():  # quantised weights cannot
                parameter.requires_grad_(True)
    return model


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What the applied method trains, by paths in the bare model, but for low-rank adapters and what goes with them.

    With those, the head is a copy in the adapter; otherwise it is trained in place, and here.
    """
    bare = BareModel(root_module(model))
    inserted = {path: module for path, module in bare.modules.items() if isinstance(module, Inserted)}
    return parameters_of(model, applied_method(model, "own_parameters"), inserted)


def parameters_of(model: nn.Module, method: Method, inserted: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The same for a ``method`` that puts ``inserted`` into ``model``, by their paths there, or has done so."""
    bare = BareModel(root_module(model))
    found = dict(method.trained_parameters(bare))
    modules = dict(inserted)
    if method.lora_config(model) is None:
        modules |= {path: bare.modules[path] for path in head_paths(bare)}
    for path, module in modules.items():
        found |= {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
    return found


def check_is_bare(model: nn.Module, caller: str) -> None:
    """ValueError: ``model`` is adapted already."""
    if (method := method_of(model)) is not None:
        raise ValueError(f"{caller}: the model is adapted by {method.name} already; call remove_method(model) first")
    if adapter_set(model) is not None:
        raise ValueError(f"{caller}: the model is injected already; call lora_ext.adapters.unload(model) first")
