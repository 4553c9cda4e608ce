"""A method that an adapted model has in place of its own, on the instance."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn


class ReplacedMethod:
    """Stands for the method ``name`` of ``module``; copied and pickled with it.

    Attributes:
        replaced: what the instance had under this name, or None.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module, self.replaced = name, module, vars(module).get(name)

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the module has without adapters."""
        return self.replaced or getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @classmethod
    def put(cls, name: str, module: nn.Module, *arguments: Any) -> None:
        """Replaces the method, if the class of ``module`` has one and it is not replaced yet."""
        if callable(getattr(type(module), name, None)) and not isinstance(vars(module).get(name), cls):
            setattr(module, name, cls(name, module, *arguments))

    @classmethod
    def restore(cls, name: str, module: nn.Module) -> None:
        """Gives ``module`` its own method back, if it has one of this class in its place."""
        method = vars(module).get(name)
        if isinstance(method, cls):
            delattr(module, name)
            if method.replaced is not None:
                setattr(module, name, method.replaced)
