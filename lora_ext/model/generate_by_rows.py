"""``model.generate(..., adapter_names=[...])``: an adapter for each prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.invocations import find_starts, tokens_in_row
from lora_ext.model.packed_rows import LENGTHS
from lora_ext.model.row_adapters import (
    ARGUMENT,
    choice_of_call,
    invocations_of,
    is_invoked,
    multiples,
    values_of,
    without_names,
)
from lora_ext.nn.packed_rows import PackedChoice
from lora_ext.nn.rows import check_order, choosing, chosen, drop_interrupted


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


class GenerateByRows(ReplacedMethod):
    """The ``generate`` of an injected model."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        drop_interrupted()
        active, names = self.adapters.active, kwargs.get(ARGUMENT)
        if names is None:
            check_order(active)
        rest, outer = without_names(kwargs), chosen(active) if active.row_calls else None
        if LENGTHS in kwargs or (names is None and isinstance(outer, PackedChoice)):
            raise ValueError(
                f"{self.caller}: {LENGTHS} is for calls of the model; generate and generate_batch take a "
                "name for each prompt"
            )
        if names is None and not (active.invoked if outer is None else is_invoked(outer)):
            return self.original(*args, **rest)
        values, caller = values_of(args, kwargs), self.caller
        choice = choice_of_call(self.model, self.adapters, values, None, outer, caller)
        if outer is not None and names is None:  # a name may be for several prompts, with other places
            choice = choice.repeated(multiples(caller, self.model, choice, values)[0])
        with choosing(choice):
            if is_invoked(choice):
                choice.starts = find_starts(values, choice.names_of_rows, invocations_of(choice), caller)
                choice.prompt = tokens_in_row(values, caller)
            return self.original(*args, **rest)
