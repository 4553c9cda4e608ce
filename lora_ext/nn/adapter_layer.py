"""The base classes of layers with adapters by name, whatever an adapter computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from lora_ext._common.arguments import checked
from lora_ext.nn.active import ActiveAdapters

# Accelerate sets these on a module that it hooks, and deletes them where it finds them.
_OF_HOOKS = frozenset({"_hf_hook", "_old_forward"})

_OF_PEFT = ("BaseTunerLayer", "AuxiliaryTrainingWrapper")
INSTEAD_OF_PEFT = (
    "each library would train and save its own adapter, and neither file would give the model back. An injected model "
    "trains by itself, without peft_config; or let PEFT adapt the plain model, and call "
    "lora_ext.integrations.peft.accelerate on it"
)
"""The end of a message about adapters of PEFT in an injected model."""


def is_of_peft(module: object) -> bool:
    """Returns whether ``module`` is a layer of PEFT, by its classes' names: PEFT may not be installed."""
    return any(kind.__name__ in _OF_PEFT and kind.__module__.startswith("peft.") for kind in type(module).__mro__)


_uses_base_keys: ContextVar[bool] = ContextVar("lora_ext_base_keys", default=False)


@contextmanager
def base_keys() -> Iterator[None]:
    """Gives ``state_dict`` of adapted models the base model's keys and no adapter's, in this thread.

    The values are those that the model computes with, except for updates that are not merged.
    """
    token = _uses_base_keys.set(True)
    try:
        yield
    finally:
        _uses_base_keys.reset(token)


class AdapterLayer(nn.Module):
    """A base layer and its adapters.

    Attributes:
        base_layer: the layer that this one replaces; kept, not copied.
        adapters: ``nn.ModuleDict`` by adapter name.
        active: names of the active adapters, shared by the layers of a model; this layer may lack some of them.
        place: orders the layers around one module, innermost first, as in PEFT's files.
    """

    place = 0

    @checked
    def __init__(self, base_layer: nn.Module, active: ActiveAdapters | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active = ActiveAdapters() if active is None else active
        self.training = self.adapters.training = base_layer.training  # train() would change the base layer's modules

    # Every forward reads these three; nn.Module's own attribute lookup takes four times as long. They need no setters:
    # nn.Module's __setattr__ puts modules into _modules.

    @property
    def base_layer(self) -> nn.Module:
        return self._modules["base_layer"]

    @property
    def adapters(self) -> nn.ModuleDict:
        return self._modules["adapters"]

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """Names of the active adapters that this layer has, in the order of activation."""
        adapters = self._modules["adapters"]._modules
        return tuple([name for name in self.active.names if name in adapters])

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "base_layer" and is_of_peft(value):  # PEFT adapts a part of an injected model, or a model around it
            raise ValueError(f"{type(self).__name__}: base_layer is a layer of PEFT; {INSTEAD_OF_PEFT}")
        super().__setattr__(name, value)

    def set_active(self, *names: str) -> None:
        """Uses exactly these adapters, here and in all layers that share :attr:`active`."""
        for name in names:
            self._check_exists(name)
        self.active.names = names

    def target_name(self, path: str) -> str:
        """Returns the name that a config uses for this layer; ``path`` is the base layer's path."""
        return path

    def file_tensors(self, path: str, adapter: nn.Module) -> dict[str, Tensor]:
        """Returns the live tensors of ``adapter`` (attached or not) that go into a file, by PEFT's keys."""
        raise NotImplementedError

    def file_tensors_of_base(self, path: str, adapter: nn.Module) -> dict[str, Tensor]:
        """The live frozen tensors that a file may hold next to the adapter's, by PEFT's keys."""
        return {
            f"{path}.base_layer.{name}": tensor
            for name, tensor in innermost(self.base_layer).state_dict(keep_vars=True).items()
        }

    def unloaded(self, merged: bool) -> nn.Module:
        """Returns the module that replaces this layer on unloading; ``merged``: it keeps active adapters' values."""
        return self.base_layer

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Returns the state, with the base layer's keys within :func:`base_keys`."""
        if not _uses_base_keys.get():
            return super().state_dict(*args, **kwargs)
        return self._base_state_dict(**dict(zip(("destination", "prefix", "keep_vars"), args, strict=False)), **kwargs)

    def _base_state_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Returns the state that a plain model has in this layer's place to compute the same."""
        return self.base_layer.state_dict(**kwargs)

    @property
    def is_needed(self) -> bool:
        """True if some adapter can make this layer compute something else than its base layer."""
        return len(self.adapters) > 0

    def _check_exists(self, name: str) -> None:
        if name not in self.adapters:
            raise KeyError(f"{type(self).__name__}: no adapter {name!r}; the adapters are {sorted(self.adapters)}")

    def _check_is_new(self, name: str) -> None:
        check_adapter_name(type(self).__name__, name)
        if name in self.adapters:
            raise ValueError(
                f"{type(self).__name__}: adapter {name!r} exists; the adapters are {sorted(self.adapters)}"
            )


class TransparentLayer(AdapterLayer):
    """An adapter layer that takes missing attributes from the module in use: for modules that other code inspects."""

    @property
    def in_use(self) -> nn.Module:
        """The module that provides missing attributes."""
        return self._modules["base_layer"]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "active" not in vars(self) or name in _OF_HOOKS:  # not initialised yet, e.g. while unpickling
                raise
            return getattr(self.in_use, name)


def check_adapter_name(caller: str, name: str) -> None:
    """Checks that ``name`` is a valid adapter name. ValueError: it is not."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"{caller}: adapter_name is {name!r}, want a name without dots that is no attribute of nn.ModuleDict, such "
            "as 'default'"
        )


def freeze(module: nn.Module) -> None:
    """Freezes the parameters of ``module``, except those of adapters inside it."""
    for parameter in module._parameters.values():
        if parameter is not None:
            parameter.requires_grad_(False)
    for name, child in module._modules.items():
        if child is not None and not (name == "adapters" and isinstance(module, AdapterLayer)):
            freeze(child)


def layers_around(module: nn.Module) -> list[AdapterLayer]:
    """Returns the adapter layers around the innermost module of ``module``, the outermost first."""
    layers = []
    while isinstance(module, AdapterLayer):
        layers.append(module)
        module = module.base_layer
    return layers


def innermost(module: nn.Module) -> nn.Module:
    """``module`` without the adapter layers around it."""
    while isinstance(module, AdapterLayer):
        module = module.base_layer
    return module
