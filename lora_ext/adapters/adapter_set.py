"""The adapters that one model holds: their configs, and which of them are in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora_ext._common.changes import changing
from lora_ext.adapters.trained_biases import TrainedBiases
from lora_ext.config import LoraConfig
from lora_ext.injection.bare_model import BareModel, adapter_layers, file_paths, root_module
from lora_ext.nn import ActiveAdapters, AdapterLayer, LoraLayer
from lora_ext.nn.trained import TrainedModule

_ATTRIBUTE = "_lora_adapters"  # of an injected model


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer's share in an adapter.

    Attributes:
        path: of the layer in the bare model.
        file_path: in keys of files, from :func:`~lora_ext.injection.bare_model.file_paths`.
        layer: which holds the adapter, or will.
        adapter: the parameters.
        replaced: modules of the model and what is to be put in their places, the layer among it; empty where it is
            there already.
        target: what the patterns of a config know it by.
        file_scale: of the update in files, where that is another than here.
    """

    path: str
    file_path: str
    layer: AdapterLayer
    adapter: nn.Module
    replaced: Mapping[nn.Module, nn.Module] = dataclasses.field(default_factory=dict)
    target: str = ""
    file_scale: float = 1.0

    def file_scale_of(self, tensor: Tensor) -> float:
        """What to multiply a tensor of the adapter by for a file, and to divide one of a file by: exact powers of 2."""
        return 1.0 if tensor is getattr(self.adapter, "lora_A", None) else self.file_scale


def located(parts: Iterable[Part]) -> tuple[Part, ...]:
    """The parts of an adapter, all of them, with what depends on the others filled in.

    Files hold half the update of an attention's ``out_proj`` that is adapted along with it, as PEFT (0.21) adds that
    twice, in every forward and when it merges. So a file means the same there and here. Attentions with query, key and
    value weights of their own are not for PEFT to read.
    """
    parts = tuple(parts)
    in_file = file_paths((part.path, part.layer) for part in parts)
    along = {
        f"{part.path}.{name}": part.path
        for part in parts
        if isinstance(part.layer, LoraLayer)
        for name in part.layer.adapted_along
    }
    halved = {f"{part.path}.out_proj" for part in parts if getattr(part.layer, "is_packed", False)}
    return tuple(
        dataclasses.replace(
            part,
            file_path=in_file[part.layer],
            target=along.get(part.path, part.layer.target_name(part.path)),
            file_scale=0.5 if part.path in halved else 1.0,
        )
        for part in parts
    )


@dataclasses.dataclass(frozen=True)
class Adapter:
    """All that one adapter consists of, attached to its model or about to be: what a file of it holds."""

    name: str
    config: LoraConfig
    into: AdapterSet
    parts: tuple[Part, ...]
    biases: TrainedBiases | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The live tensors by their keys in a file, without the prefix that all have."""
        tensors = {}
        for part in self.parts:
            tensors |= part.layer.file_tensors(part.file_path, part.adapter)
        if self.biases is not None:
            tensors |= self.biases.file_tensors()
        return tensors

    def file_scales(self) -> dict[str, float]:
        """Of the same keys, those of tensors that files hold multiplied by a number, and that number."""
        return {
            key: part.file_scale_of(tensor)
            for part in self.parts
            if part.file_scale != 1.0
            for key, tensor in part.layer.file_tensors(part.file_path, part.adapter).items()
        }

    def base_tensors(self) -> dict[str, Tensor]:
        """Frozen tensors of the base layers that a file may hold too, as PEFT's do of adapted embeddings and heads."""
        tensors = {}
        for part in self.parts:
            tensors |= part.layer.file_tensors_of_base(part.file_path, part.adapter)
        return tensors


class AdapterSet:
    """The named adapters of an injected model: an attribute of its root, copied and pickled with it.

    Attributes:
        configs: by adapter name, in the order they were added.
        active: the names in use; every layer of the model holds this object.
        biases: of the adapter that trains the model's own biases, if one does.
        trained: by adapter name, the paths of the modules that it trains in full.
    """

    def __init__(self) -> None:
        self.configs: dict[str, LoraConfig] = {}
        self.active = ActiveAdapters()
        self.biases: dict[str, TrainedBiases] = {}
        self.trained: dict[str, frozenset[str]] = {}
        self._trainable: set[str] = set()
        # By adapter name, the dicts in which its modules keep their parameters: looking for them would take most of the
        # time of a switch.
        self._parameters: dict[str, list[dict[str, nn.Parameter | None]]] = {}

    def check_enabled(self, caller: str) -> None:
        """RuntimeError: what is in use cannot change now, as it is to be restored."""
        if self.active.is_disabled:
            raise RuntimeError(f"{caller}: the adapters are disabled; leave disable_adapters first")

    def add(self, adapter: Adapter) -> None:
        """Takes note of an adapter whose parts are attached."""
        self.configs[adapter.name] = adapter.config
        modules = (module for part in adapter.parts for module in part.adapter.modules())
        self._parameters[adapter.name] = [module._parameters for module in modules if module._parameters]
        self.trained[adapter.name] = frozenset(
            part.path for part in adapter.parts if isinstance(part.layer, TrainedModule)
        )
        if adapter.biases is not None:
            self.biases[adapter.name] = adapter.biases
        if not adapter.config.inference_mode:
            self._trainable.add(adapter.name)
        self._set_requires_grad(adapter.name, False)  # until it is used

    def remove(self, name: str) -> None:
        del self.configs[name], self._parameters[name], self.trained[name]
        self.biases.pop(name, None)
        self._trainable.discard(name)

    def rename(self, old: str, new: str) -> None:
        """Under its new name it keeps its place in the order."""
        for held in (self.configs, self._parameters, self.trained, self.biases):
            entries = {new if name == old else name: value for name, value in held.items()}
            held.clear()
            held.update(entries)
        self.active.names = tuple(new if name == old else name for name in self.active.names)
        self._trainable = {new if name == old else name for name in self._trainable}

    def switch(self, names: tuple[str, ...], trainable: bool | None = None) -> None:
        """Uses these adapters. Only parameters of trainable adapters that begin or cease to be used are touched."""
        with changing(self.active):
            before, self.active.names = self.active.names, names
            touched = set()
            if trainable is not None:
                touched |= set(names)
                self._trainable = self._trainable | set(names) if trainable else self._trainable - set(names)
            touched |= self._trainable & (set(before) ^ set(names))
            for name in touched:
                self._set_requires_grad(name, name in names and name in self._trainable)
            for name, biases in self.biases.items():
                biases.use(name in names)

    def _set_requires_grad(self, name: str, requires_grad: bool) -> None:
        for parameters in self._parameters[name]:
            for parameter in parameters.values():
                if parameter is not None:
                    try:
                        parameter.requires_grad = requires_grad
                    except RuntimeError:
                        if parameter.is_floating_point():  # a module to save may have others
                            raise
        if (biases := self.biases.get(name)) is not None:
            biases.requires_grad_(requires_grad)


def adapter_set(model: nn.Module) -> AdapterSet | None:
    """The adapters of a model that was injected, or None."""
    return vars(root_module(model)).get(_ATTRIBUTE)


def attach_adapter_set(model: nn.Module, adapters: AdapterSet) -> None:
    setattr(root_module(model), _ATTRIBUTE, adapters)


def forget_adapter_set(module: nn.Module) -> None:
    """Clears what :func:`attach_adapter_set` left on a module."""
    vars(module).pop(_ATTRIBUTE, None)


def find_adapters(model: nn.Module, caller: str) -> AdapterSet:
    """The adapters of an injected model.

    Raises:
        ValueError: it is not injected.
    """
    adapters = adapter_set(model)
    if adapters is None:
        raise ValueError(
            f"{caller}: {type(root_module(model)).__name__} is not injected; call lora_ext.inject on it (on this "
            "module, not on a part of it)"
        )
    return adapters


def find_adapter(model: nn.Module, caller: str, name: str | None = None) -> Adapter:
    """One adapter of an injected model; None: the active one.

    Raises:
        ValueError: the model is not injected, or without a name, not exactly one adapter is active.
        KeyError: there is no such adapter.
    """
    adapters = find_adapters(model, caller)
    if name is None:
        if len(adapters.active.names) != 1:
            raise ValueError(
                f"{caller}: the active adapters are {list(adapters.active.names)}, not just one: say which is meant; "
                f"the adapters are {sorted(adapters.configs)}"
            )
        (name,) = adapters.active.names
    check_names(caller, adapters.configs, [name])
    paths = {id(layer): path for path, around in BareModel(root_module(model)).layers.items() for layer in around}
    layers = [(paths[id(layer)], layer) for _, layer in adapter_layers(model) if name in layer.adapters]
    parts = located(Part(path, path, layer, layer.adapters[name]) for path, layer in layers)
    return Adapter(name, adapters.configs[name], adapters, parts, adapters.biases.get(name))


def check_names(caller: str, known: Mapping[str, object] | Iterable[str], names: Iterable[str]) -> None:
    known = sorted(known)
    for name in names:
        if name not in known:
            raise KeyError(f"{caller}: there is no adapter {name!r}; the adapters are {known}")
