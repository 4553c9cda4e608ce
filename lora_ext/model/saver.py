"""Replaces ``save_pretrained`` of an injected model, and of its modules that have one, on the instance.

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
    """The ``save_pretrained`` of a module that has adapters inside. It is copied and pickled with the module.

    Attributes:
        save: called with the module, its adapters, the original method, and the arguments.
        module, adapters: what to save.
        replaced: what the instance had as its ``save_pretrained``, or None.
    """

    save: ClassVar[Callable[..., Any]]

    def __init__(self, module: nn.Module, adapters: AdapterSet, replaced: Any) -> None:
        self.module, self.adapters, self.replaced = module, adapters, replaced

    @property
    def original(self) -> Callable[..., Any]:
        """The method that the module has without adapters."""
        return self.replaced or getattr(type(self.module), _METHOD).__get__(self.module)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return SavePretrained.save(self.module, self.adapters, self.original, args, kwargs)


def savers(root: nn.Module) -> list[nn.Module]:
    """``root`` and the modules in it that have a ``save_pretrained`` and adapters inside."""
    return [
        module
        for module in root.modules()
        if callable(getattr(type(module), _METHOD, None)) and any(adapter_layers(module))
    ]


def replace_save_pretrained(module: nn.Module, adapters: AdapterSet) -> None:
    """Makes ``module`` save itself by :class:`SavePretrained`."""
    replaced = vars(module).get(_METHOD)
    if not isinstance(replaced, SavePretrained):
        setattr(module, _METHOD, SavePretrained(module, adapters, replaced))


def restore_save_pretrained(module: nn.Module) -> None:
    """Undoes :func:`replace_save_pretrained`."""
    saver = vars(module).get(_METHOD)
    if isinstance(saver, SavePretrained):
        del vars(module)[_METHOD]
        if saver.replaced is not None:
            setattr(module, _METHOD, saver.replaced)
