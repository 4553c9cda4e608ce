"""Replaces ``save_pretrained`` of an adapted model, and of its parts that have one, on the instance.

Other libraries call it: Transformers' ``Trainer``, sentence-transformers. lora_ext/files/save_pretrained.py decides
what it writes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.adapter_state import forget_guard, guard_loading
from lora_ext.model.bare_model import adapter_layers
from lora_ext.model.method_files import MethodFiles
from lora_ext.model.replaced_method import ReplacedMethod

_METHOD = "save_pretrained"


class SavePretrained(ReplacedMethod):
    """The ``save_pretrained`` of ``module``, a part of the adapted model ``root`` or all of it.

    Attributes:
        save: called with this object and the arguments by name.
    """

    save: ClassVar[Callable[..., Any]]

    def __init__(self, root: nn.Module, module: nn.Module) -> None:
        super().__init__(_METHOD, module)
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.__signature__.bind(*args, **kwargs)
        options = dict(bound.arguments)
        for parameter in bound.signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                options |= options.pop(parameter.name, {})
        return SavePretrained.save(self, options)


def savers(root: nn.Module) -> list[nn.Module]:
    """Returns ``root`` and the modules in it that have a ``save_pretrained`` and adapters inside."""
    return [module for module in root.modules() if _saves_itself(module) and any(adapter_layers(module))]


def serve_files(root: nn.Module) -> None:
    """Sets what the adapted model ``root`` saves and takes from a ``state_dict``; what is set already stays."""
    guard_loading(root)
    for module in root.modules():
        if _saves_itself(module) and not isinstance(vars(module).get(_METHOD), SavePretrained):
            setattr(module, _METHOD, SavePretrained(root, module))


def stop_serving_files(root: nn.Module) -> None:
    """Undoes :func:`serve_files` if ``root`` has neither adapters nor a method's modules any more."""
    if adapter_set(root) is not None or MethodFiles.of(root) is not None:
        return
    forget_guard(root)
    for module in root.modules():
        SavePretrained.restore(_METHOD, module)


def _saves_itself(module: nn.Module) -> bool:
    return callable(getattr(type(module), _METHOD, None))
