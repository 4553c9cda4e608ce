"""Applies a method to a model and removes it; lists the parameters that it trains."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.sharded import gathered
from lora_ext.adapters.merge_model import unload
from lora_ext.injection.build import Injection
from lora_ext.injection.inject import apply_injection, prepare_modules, release_modules
from lora_ext.methods.base import Inserted, Insertion, Method, head_paths, insert, remove_inserted
from lora_ext.model.adapter_set import Adapter, adapter_set
from lora_ext.model.bare_model import BareModel, check_not_managed, root_module
from lora_ext.model.replaced_methods import serve_files
from lora_ext.quantized import quantized_weight

ModelT = TypeVar("ModelT", bound=nn.Module)

_ATTRIBUTE = "_adaptation_method"  # attribute of the root module


@checked
@one_at_a_time
def apply_method(model: ModelT, method: Method) -> ModelT:
    """Adapts ``model`` in place: inserts the modules of ``method`` and freezes all parameters that it does not train.

    A new head (the classifier of a Transformers model for classification) is trained too. Outputs do not change until
    the model is trained, except with prefix methods. Returns ``model``, the same object.

    Raises:
        TypeError: the architecture is not supported (the message lists those that are), or the model has nothing for
            the method to train.
        ValueError: the model is adapted already, or an option does not fit it. After an error the model is unchanged.
    """
    carry_out(model, method, *prepare_method(model, method))
    return model


@checked
def prepare_method(model: nn.Module, method: Method) -> tuple[list[Insertion], Adapter | None]:
    """Returns what :func:`apply_method` will insert, or raises its errors; does not change ``model``."""
    check_is_bare(model, "apply_method")
    check_not_managed("apply_method", model, "apply the method before deepspeed.initialize (before Trainer.train)")
    with gathered(model.parameters()):  # ZeRO-3 may have partitioned them as they were loaded
        insertions = method.insertions(model)
        method.trained_parameters(BareModel(root_module(model)))
        config = method.lora_config(model)
        adapter = None if config is None else Injection(model, config, "default").build()
    _check_apart(method, insertions, adapter)
    return insertions, adapter


def _check_apart(method: Method, insertions: list[Insertion], adapter: Adapter | None) -> None:
    """Raises ValueError if two modules would get one name, or a host would be replaced by the low-rank adapter."""
    places = [(insertion.path, insertion.name) for insertion in insertions]
    if twice := [path for path, name in places if places.count((path, name)) > 1]:
        raise ValueError(f"{method.name}: its methods would both put a module at {twice[0]!r}; choose one of them")
    replaced = {old for part in adapter.parts for old in part.replaced} if adapter is not None else set()
    inside = {module for old in replaced for module in old.modules()}
    if lost := [insertion.path for insertion in insertions if insertion.host in inside]:
        said = f"the method inserts a module into {lost[0]!r}, which the low-rank adapter replaces"
        raise ValueError(f"{method.name}: {said}; leave it out of target_modules and modules_to_save")


def carry_out(model: nn.Module, method: Method, insertions: list[Insertion], adapter: Adapter | None = None) -> None:
    """Inserts the modules and the low-rank adapter; no adapter if None: there is one already or none is needed."""
    root = root_module(model)
    if adapter is not None:
        apply_injection(model, adapter)
    elif adapter_set(model) is None:
        root.requires_grad_(False)
        prepare_modules(root)
    for insertion in insertions:
        insert(insertion)
    vars(root)[_ATTRIBUTE] = method
    if insertions:  # files of the base model would load without them
        serve_files(root)
    for parameter in trained_by(model, method).values():
        parameter.requires_grad_(True)


@checked
def method_of(model: nn.Module) -> Method | None:
    """Returns the method that was applied to ``model``, or None."""
    return getattr(root_module(model), _ATTRIBUTE, None)


def applied_method(model: nn.Module, caller: str) -> Method:
    """Returns the applied method. ValueError: none was applied, or its low-rank adapter is gone."""
    method = method_of(model)
    if method is None:
        raise ValueError(f"{caller}: {type(root_module(model)).__name__} is not adapted; call apply_method(model, ...)")
    if caller != "remove_method" and method.lora_config(model) is not None and adapter_set(model) is None:
        said = f"the low-rank adapter of {method.name} was merged for good or removed"
        raise ValueError(f"{caller}: {said}; call remove_method(model), which keeps the weights")
    return method


@checked
@one_at_a_time
def remove_method(model: ModelT) -> ModelT:
    """Removes what :func:`apply_method` inserted. Parameters trained in place (biases, a head, all) keep their values.

    All parameters then require gradients, as in a new model. Returns ``model``, the same object.

    ValueError: no method was applied. RuntimeError: a low-rank adapter is merged. The model is unchanged.
    """
    applied_method(model, "remove_method")
    if adapter_set(model) is not None:
        unload(model)
    root = root_module(model)
    remove_inserted(root)
    delattr(root, _ATTRIBUTE)
    release_modules(root)
    weights = [quantized_weight(module) for module in model.modules()]
    quantized = {id(weight.module.weight) for weight in weights if weight is not None}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in quantized:
            parameter.requires_grad_(True)
    return model


def trained_by(model: nn.Module, method: Method, insertions: Iterable[Insertion] = ()) -> dict[str, nn.Parameter]:
    """Returns the parameters that ``method`` trains, by path in the bare model, except the low-rank adapter's.

    With such an adapter, the head is a copy in it. ``insertions`` are modules that are not in the model yet.
    """
    bare = BareModel(root_module(model))
    found = dict(method.trained_parameters(bare))
    modules = {path: module for path, module in bare.modules.items() if isinstance(module, Inserted)}
    modules |= {f"{place.path}.{place.name}".lstrip("."): place.module for place in insertions}
    if method.lora_config(model) is None:
        modules |= {path: bare.modules[path] for path in head_paths(bare)}
    for path, module in modules.items():
        found |= {f"{path}.{name}": parameter for name, parameter in module.named_parameters()}
    return found


def check_is_bare(model: nn.Module, caller: str) -> None:
    """Raises ValueError if ``model`` is adapted already."""
    if (method := method_of(model)) is not None:
        raise ValueError(f"{caller}: the model is adapted by {method.name} already; call remove_method(model) first")
    if adapter_set(model) is not None:
        raise ValueError(f"{caller}: the model is injected already; call lora_ext.adapters.unload(model) first")
