"""Replaces ``save_pretrained`` of an adapted model, and of its modules that have one, on the instance.

Other libraries call it on the model or on a part: Transformers' ``Trainer``, sentence-transformers, diffusers'
pipelines. lora_ext/files/save_pretrained.py decides what it writes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.bare_model import adapter_layers

_METHOD = "save_pretrained"


class SavePretrained:
    """The ``save_pretrained`` of a module with adapters or inserted modules, copied and pickled with the module.

    Attributes:
        save: called with this object and the arguments.
        module: what to save.
        replaced: what the instance had as its ``save_pretrained``, or None.
        adapters: the adapters inside ``module``, or None.
        has_method: whether a method (lora_ext.methods) inserted modules inside.
    """

    save: ClassVar[Callable[..., Any]]

    adapters: AdapterSet | None = None
    has_method = False

    def __init__(self, module: nn.Module, replaced: Any) -> None:
        self.module, self.replaced = module, replaced

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the module has without adapters."""
        return self.replaced or getattr(type(self.module), _METHOD).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return SavePretrained.save(self, args, kwargs)


def savers(root: nn.Module) -> list[nn.Module]:
    """``root`` and the modules in it that have a ``save_pretrained`` and adapters inside."""
    return [module for module in root.modules() if has_save_pretrained(module) and any(adapter_layers(module))]


def has_save_pretrained(module: nn.Module) -> bool:
    return callable(getattr(type(module), _METHOD, None))


def replace_save_pretrained(module: nn.Module, *, adapters: AdapterSet | None = None, has_method: bool = False) -> None:
    """Makes ``module`` save itself by :class:`SavePretrained`, because of adapters or of a method's modules."""
    saver = vars(module).get(_METHOD)
    if not isinstance(saver, SavePretrained):
        saver = SavePretrained(module, saver)
        setattr(module, _METHOD, saver)
    if adapters is not None:
        saver.adapters = adapters
    saver.has_method |= has_method


def restore_save_pretrained(module: nn.Module, *, adapters: bool = False, method: bool = False) -> None:
    """Undoes :func:`replace_save_pretrained` for adapters, or for a method; nothing happens if it was not called."""
    saver = vars(module).get(_METHOD)
    if not isinstance(saver, SavePretrained):
        return
    if adapters:
        saver.adapters = None
    if method:
        saver.has_method = False
    if saver.adapters is None and not saver.has_method:
        del vars(module)[_METHOD]
        if saver.replaced is not None:
            setattr(module, _METHOD, saver.replaced)
