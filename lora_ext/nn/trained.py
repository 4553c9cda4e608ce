"""A module that adapters train in full (``modules_to_save``), in one copy per adapter."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lora_ext.nn.adapter_layer import TransparentLayer
from lora_ext.nn.rows import add_by_rows, row_choice


class TrainedModule(TransparentLayer):
    """A module and trained copies of it, by adapter name; the active adapter's copy is used.

    It takes missing attributes from the module in use: code that reads ``model.lm_head.weight`` keeps working.

    Args:
        base_layer: the module; kept, frozen, and used if no active adapter has a copy.
        active: names of the active adapters, shared with other layers.
    """

    def add_adapter(self, name: str, copy: nn.Module) -> None:
        """Adds ``copy`` under ``name`` and freezes the module itself. ValueError: the name is taken."""
        self._check_is_new(name)
        self.adapters[name] = copy
        self.base_layer.requires_grad_(False)

    @property
    def in_use(self) -> nn.Module:
        """The first active adapter's copy, or the module itself."""
        adapters = self._modules["adapters"]
        for name in self.active.names:
            if name in adapters:
                return adapters[name]
        return self._modules["base_layer"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (choice := row_choice(self.active)) is None:
            return self.in_use(*args, **kwargs)
        adapters = self.adapters
        names = tuple(name for name in choice.names if name in adapters)
        if choice.is_uniform or not names:
            return (adapters[names[0]] if names else self.base_layer)(*args, **kwargs)
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
            raise ValueError(f"{type(self).__name__}: adapter_names needs a module that is called with one tensor")
        return add_by_rows(self, args[0], choice, names, lambda y, x, name: adapters[name](x).to(y.dtype))

    def _base_state_dict(self, **kwargs: Any) -> dict[str, Any]:
        return self.in_use.state_dict(**kwargs)

    def file_tensors(self, path: str, adapter: nn.Module) -> dict[str, Tensor]:
        return {f"{path}.{name}": tensor for name, tensor in adapter.state_dict().items()}

    def file_tensors_of_base(self, path: str, adapter: nn.Module) -> dict[str, Tensor]:
        return {}

    def unloaded(self, merged: bool) -> nn.Module:
        return self.in_use if merged else self.base_layer
