"""Methods that an adapted model has in place of its own, on the instance: the base class, and ``save_pretrained``.

Other libraries call ``save_pretrained``: Transformers' ``Trainer``, sentence-transformers.
lora_ext/files/save_pretrained.py decides what it writes.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.adapter_state import MethodFiles, forget_guard, guard_loading
from lora_ext.model.bare_model import adapter_layers


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


_SAVE = "save_pretrained"


class SavePretrained(ReplacedMethod):
    """The ``save_pretrained`` of ``module``, a part of the adapted model ``root`` or all of it.

    Attributes:
        save: called with this object, the directory and the options.
    """

    save: ClassVar[Callable[..., Any]]

    def __init__(self, name: str, module: nn.Module, root: nn.Module) -> None:
        super().__init__(name, module)
        self.root = root

    def __call__(self, save_directory: str | os.PathLike[str], **options: Any) -> Any:
        return SavePretrained.save(self, Path(save_directory), options)


def savers(root: nn.Module) -> list[nn.Module]:
    """Returns the modules in ``root``, and it, that have a ``save_pretrained`` and adapters inside."""
    has_method = (module for module in root.modules() if callable(getattr(type(module), _SAVE, None)))
    return [module for module in has_method if any(adapter_layers(module))]


def serve_files(root: nn.Module) -> None:
    """Sets what the adapted model ``root`` saves and takes from a ``state_dict``; what is set already stays."""
    guard_loading(root)
    for module in root.modules():
        SavePretrained.put(_SAVE, module, root)


def stop_serving_files(root: nn.Module) -> None:
    """Undoes :func:`serve_files` if ``root`` has neither adapters nor a method's modules any more."""
    if adapter_set(root) is None and MethodFiles.of(root) is None:
        forget_guard(root)
        for module in root.modules():
            SavePretrained.restore(_SAVE, module)
