"""The base of methods that an injected model has in place of Transformers' own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lora_ext.model.adapter_set import AdapterSet


class ReplacedMethod:
    """A method of Transformers' models that an injected model has in another form. It is copied and pickled with it.

    Attributes:
        name: of the method.
        model, adapters: the model and its adapters.
        replaced: what the instance had under this name, or None.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, adapters: AdapterSet, replaced: Any) -> None:
        self.model, self.adapters, self.replaced = model, adapters, replaced

    @classmethod
    def put(cls, root: nn.Module, adapters: AdapterSet) -> None:
        if callable(getattr(type(root), cls.name, None)):
            setattr(root, cls.name, cls(root, adapters, vars(root).get(cls.name)))

    @classmethod
    def remove(cls, module: nn.Module) -> None:
        method = vars(module).get(cls.name)
        if isinstance(method, cls):
            delattr(module, cls.name)
            if method.replaced is not None:
                setattr(module, cls.name, method.replaced)

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the model has without adapters."""
        return self.replaced or getattr(type(self.model), self.name).__get__(self.model)

    @property
    def caller(self) -> str:
        """The method's name in messages."""
        return f"{type(self.model).__name__}.{self.name}"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)
