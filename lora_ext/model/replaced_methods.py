"""Attributes and methods that an adapted model has in place of its own, on the instance, such as ``save_pretrained``.

Other libraries call the methods: Transformers' ``Trainer``, sentence-transformers, TRL.
lora_ext/files/save_pretrained.py decides what is saved.
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

_BEFORE = "_before_lora"  # by name, what an instance had itself: a list of one value, or an empty one


def replace_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Gives ``module`` another attribute until :func:`put_back`. One that is replaced already stays as it is."""
    before = vars(module).setdefault(_BEFORE, {})
    if name not in before:
        before[name] = [vars(module)[name]] if name in vars(module) else []
        vars(module)[name] = value


def put_back(model: nn.Module) -> None:
    """Gives the modules of ``model`` their own attributes back, unless a method's modules are still in it."""
    if adapter_set(model) is not None or MethodFiles.of(model) is not None:
        return
    for module in model.modules():
        forget_guard(module)
        for name, before in vars(module).pop(_BEFORE, {}).items():
            vars(module).pop(name, None)
            if before:
                vars(module)[name] = before[0]


class ReplacedMethod:
    """Stands for the method ``name`` of ``module``; copied and pickled with it."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the module has without adapters."""
        before = vars(self.module)[_BEFORE][self.name]
        return before[0] if before else getattr(type(self.module), self.name).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @classmethod
    def put(cls, name: str, module: nn.Module, *arguments: Any) -> None:
        """Replaces the method, if the class of ``module`` has one."""
        if callable(getattr(type(module), name, None)):
            replace_attribute(module, name, cls(name, module, *arguments))


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
