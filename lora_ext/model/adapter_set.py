"""The adapters of one model: their configs, which are active, and the model's own biases that they train."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.messages import first_of
from lora_ext._common.modules import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.model.bare_model import BareModel, adapter_layers, file_paths, root_module
from lora_ext.nn import ActiveAdapters, AdapterLayer, LoraLayer
from lora_ext.nn.adapter_layer import check_adapter_name
from lora_ext.nn.base_layer import is_offloaded

_ATTRIBUTE = "_lora_adapters"  # the attribute of an injected model that holds its AdapterSet

UNSCALED = (".lora_A.weight", ".lora_embedding_A", ".lora_magnitude_vector")
"""Ends of the keys of tensors that no scaling is multiplied into."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer's part of an adapter."""

    path: str  # in the bare model
    layer: AdapterLayer  # holds the adapter, or will hold it
    adapter: nn.Module  # the parameters
    # Modules by others that take their place, layer among them.
    replaced: Mapping[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)
    # From complete_parts:
    file_path: str = ""  # what keys in files begin with
    target: str = ""  # the path to match with the patterns of a config
    file_scale: float = 1.0  # the factor of the update in files, which loading divides by

    def file_scale_of(self, key: str) -> float:
        return 1.0 if key.endswith(UNSCALED) else self.file_scale


def complete_parts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Fills in the fields of an adapter's parts that depend on its other parts. ``parts`` must be all of them.

    If an attention's ``out_proj`` is adapted along with it, files hold half of its update: PEFT (0.21) adds it twice.
    """
    parts = tuple(parts)
    in_file = file_paths((part.path, part.layer) for part in parts)
    along = {
        f"{part.path}.{name}": part.path
        for part in parts
        if isinstance(part.layer, LoraLayer)
        for name in part.layer.adapted_along
    }
    return tuple(
        dataclasses.replace(
            part,
            file_path=in_file[part.layer],
            target=along.get(part.path, part.layer.target_name(part.path)),
            file_scale=0.5 if part.path in along else 1.0,
        )
        for part in parts
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One adapter with all its parts, whether attached to its model or not."""

    name: str
    config: LoraConfig
    into: AdapterSet  # of the model that it is for; has it once it is attached
    parts: tuple[Part, ...]  # one for each layer, in the model's order
    biases: TrainedBiases | None = None  # the model's biases that it trains

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by their keys in files."""
        tensors = {}
        for part in self.parts:
            tensors |= part.layer.file_tensors(part.file_path, part.adapter)
        if self.biases is not None:
            tensors |= self.biases.file_tensors()
        return tensors

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters whose values :meth:`tensors` has, if only as views."""
        for part in self.parts:
            yield from part.adapter.parameters()
        if self.biases is not None:
            yield from self.biases.parameters()

    def file_scales(self) -> dict[str, float]:
        """The factors of tensors that are scaled in files, by the keys of :meth:`tensors`."""
        return {
            key: part.file_scale_of(key)
            for part in self.parts
            if part.file_scale != 1.0
            for key in part.layer.file_tensors(part.file_path, part.adapter)
        }

    def base_tensors(self, root: nn.Module) -> dict[str, Tensor]:
        """The live frozen tensors of the model ``root`` that a file may hold too, by their keys.

        PEFT saves those of adapted embeddings and heads, and of all of them if the vocabulary was resized. Their keys
        are ``<path>.weight``, or ``<path>.base_layer.weight`` of an adapted layer.
        """
        tensors: dict[str, Tensor] = {}
        for part in self.parts:
            tensors |= part.layer.file_tensors_of_base(part.file_path, part.adapter)
        bare, adapted = BareModel(root), {part.path for part in self.parts}
        for path, module in bare.modules.items():
            if path not in adapted and (module is bare.embedding or module is bare.head):
                state = module.state_dict(keep_vars=True)
                tensors |= {f"{KEY_PREFIX}{path}.{name}": tensor for name, tensor in state.items()}
        in_adapter = self.tensors()
        return {key: tensor for key, tensor in tensors.items() if key not in in_adapter}


class TrainedBiases:
    """Biases that an adapter trains in place, and their original values, which PEFT loses.

    Args:
        owners: maps what keys in files begin with to modules with a ``bias``.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        self.used = True
        first: dict[int, str] = {}
        # Maps every path to the first path with the same parameter: BERT's head has one bias in two modules.
        self._first = {path: first.setdefault(id(owner.bias), path) for path, owner in owners.items()}
        self._owners = {path: owners[path] for path in first.values()}
        # The values not in place now: the original ones while the trained ones are used, and the reverse.
        self._others = {path: owner.bias.detach().clone() for path, owner in self._owners.items()}

    @torch.no_grad()
    def use(self, used: bool) -> None:
        """Puts the trained values (``used``) or the original ones in place."""
        if used == self.used:
            return
        for path, owner in self._owners.items():
            other = self._others[path].to(owner.bias)
            self._others[path] = owner.bias.detach().clone()
            owner.bias.copy_(other)
        self.used = used

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yields the parameters that the biases are in, whatever values they have now."""
        for owner in self._owners.values():
            yield owner.bias

    def originals(self) -> dict[int, nn.Parameter]:
        """The original values by parameter ``id``; empty if they are in place."""
        used = self._owners.items() if self.used else ()
        return {id(owner.bias): nn.Parameter(self._others[path].clone().to(owner.bias)) for path, owner in used}

    def file_tensors(self) -> dict[str, Tensor]:
        """The trained values by their file keys."""
        values = {path: owner.bias for path, owner in self._owners.items()} if self.used else self._others
        return {f"{path}.bias": values[first] for path, first in self._first.items()}


class AdapterSet:
    """The named adapters of an injected model: an attribute of its root, copied and pickled with it.

    Attributes:
        configs: by adapter name, in the order of addition; ``inference_mode``: it is not to train.
        active: the names of the active adapters; all layers of the model share this object.
        biases: by adapter name; at most one adapter trains the model's biases.
        loaded_base: by adapter name, the file keys of base layers that were loaded with it; saved again with it.
        share_inputs: whether layers that read one tensor are computed together.
        pool: where rows find adapters that the layers lack, or None: a :class:`lora_ext.AdapterPool`.
    """

    share_inputs = True
    pool: Any = None

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.active = ActiveAdapters()
        self.biases: dict[str, TrainedBiases] = {}
        self.loaded_base: dict[str, frozenset[str]] = {}
        # By adapter name, the ``_parameters`` dicts of its modules: finding them would take most of a switch's time.
        self._parameters: dict[str, list[dict[str, nn.Parameter | None]]] = {}

    def check_enabled(self, caller: str) -> None:
        """Checks that the active adapters may change. RuntimeError: disable_adapters will restore them."""
        if self.active.is_disabled:
            raise RuntimeError(f"{caller}: the adapters are disabled; leave disable_adapters first")

    def check_names(self, caller: str, names: Iterable[str]) -> None:
        """Checks that the model has these adapters itself. KeyError: it has not; the message lists them."""
        known = sorted(self.configs)
        for name in names:
            if name not in known:
                raise KeyError(f"{caller}: there is no adapter {name!r}; the adapters are {known}")

    def add(self, adapter: Adapter) -> None:
        """Registers an adapter whose parts are attached. Until it is active, it is frozen, without its biases."""
        self.configs[adapter.name] = adapter.config
        modules = (module for part in adapter.parts for module in part.adapter.modules())
        self._parameters[adapter.name] = [module._parameters for module in modules if module._parameters]
        if adapter.biases is not None:
            self.biases[adapter.name] = adapter.biases
            adapter.biases.use(False)
        self._set_requires_grad(adapter.name, False)

    def remove(self, name: str) -> None:
        del self.configs[name], self._parameters[name]
        self.biases.pop(name, None)
        self.loaded_base.pop(name, None)

    def rename(self, old: str, new: str) -> None:
        """Renames an adapter; it keeps its place in the order."""
        for held in (self.configs, self._parameters, self.biases, self.loaded_base):
            entries = {new if name == old else name: value for name, value in held.items()}
            held.clear()
            held.update(entries)
        self.active.names = tuple(new if name == old else name for name in self.active.names)

    def switch(self, names: tuple[str, ...], trainable: bool | None = None) -> None:
        """Activates exactly these adapters. Changes parameters only of trainable adapters whose state changes."""
        before, self.active.names = self.active.names, names
        changed = set()
        if trainable is not None:
            changed |= set(names)
            for name in names:
                self.configs[name] = dataclasses.replace(self.configs[name], inference_mode=not trainable)
        trains = {name for name, config in self.configs.items() if not config.inference_mode}
        changed |= trains & (set(before) ^ set(names))
        # Single factors that the user froze stay frozen; an adapter frozen as a whole (model.requires_grad_(False))
        # does not.
        changed |= {name for name in trains & set(before) & set(names) if self.is_frozen(name)}
        for name in changed:
            self._set_requires_grad(name, name in names and name in trains)
        for name, biases in self.biases.items():
            biases.use(name in names)

    def is_frozen(self, name: str) -> bool:
        """Returns whether no parameter of the adapter requires a gradient."""
        found = (p for parameters in self._parameters[name] for p in parameters.values() if p is not None)
        return not any(parameter.requires_grad for parameter in found)

    def _set_requires_grad(self, name: str, requires_grad: bool) -> None:
        for parameters in self._parameters[name]:
            for parameter in parameters.values():
                if parameter is not None:
                    try:
                        parameter.requires_grad = requires_grad
                    except RuntimeError:
                        if parameter.is_floating_point():  # a module to save may have integer parameters
                            raise
        for bias in self.biases[name].parameters() if name in self.biases else ():
            bias.requires_grad = requires_grad


def adapter_set(model: nn.Module) -> AdapterSet | None:
    """The adapters of an injected model, or None."""
    return vars(root_module(model)).get(_ATTRIBUTE)


def attach_adapter_set(model: nn.Module, adapters: AdapterSet) -> None:
    vars(root_module(model))[_ATTRIBUTE] = adapters  # not setattr, which wrappers may hand on to what they wrap


def forget_adapter_set(module: nn.Module) -> None:
    """Undoes :func:`attach_adapter_set`."""
    vars(module).pop(_ATTRIBUTE, None)


def find_adapters(model: nn.Module, caller: str) -> AdapterSet:
    """The adapters of an injected model. ValueError: it is not injected."""
    adapters = adapter_set(model)
    if adapters is None:
        raise ValueError(
            f"{caller}: {type(root_module(model)).__name__} is not injected; call lora_ext.inject on it, or pass the "
            "part of it that was injected"
        )
    return adapters


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
        for path, layer in adapter_layers(model)
        if isinstance(layer, LoraLayer) and (layer.is_merged if name is None else name in layer.merged_adapters)
    ]
    if merged:
        what, unmerge = ("adapters are", "") if name is None else (f"{name!r} is", f", {name!r}")
        raise RuntimeError(f"{caller}: {what} merged into {first_of(merged)}; call unmerge(model{unmerge}) first")


def find_adapter(model: nn.Module, caller: str, name: str | None = None) -> Adapter:
    """The adapter ``name`` of an injected model; None: the active one.

    ValueError: the model is not injected, or ``name`` is None and not one adapter is active. KeyError: there is none.
    """
    adapters = find_adapters(model, caller)
    if name is None:
        if len(adapters.active.names) != 1:
            raise ValueError(
                f"{caller}: the active adapters are {list(adapters.active.names)}, want exactly one, or a name; the "
                f"adapters are {sorted(adapters.configs)}"
            )
        (name,) = adapters.active.names
    adapters.check_names(caller, [name])
    root = root_module(model)
    paths = {id(layer): path for path, around in BareModel(root).layers.items() for layer in around}
    layers = [(paths[id(layer)], layer) for _, layer in adapter_layers(root) if name in layer.adapters]
    parts = complete_parts(Part(path, layer, layer.adapters[name]) for path, layer in layers)
    for part in parts:
        if any(is_offloaded(module, key) for module in part.adapter.modules() for key in module._parameters):
            raise RuntimeError(
                f"{caller}: the factors of {part.path!r} are offloaded; inject or load after you offload the model"
            )
    return Adapter(name, adapters.configs[name], adapters, parts, adapters.biases.get(name))
