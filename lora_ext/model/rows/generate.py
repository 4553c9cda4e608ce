"""``model.generate(..., adapter_names=[...])``: an adapter for each prompt."""

from __future__ import annotations

from typing import Any

from lora_ext.model.rows.arguments import LENGTHS, NAMES, tokens_in_row, values_of, without_names
from lora_ext.model.rows.calls import check_media, choice_of_call, invocations_of, is_invoked, multiples
from lora_ext.model.rows.invocations import find_starts
from lora_ext.model.rows.replaced_method import ReplacedMethod
from lora_ext.nn.rows.in_force import check_order, choosing, chosen, drop_interrupted
from lora_ext.nn.rows.packed import PackedChoice


class GenerateByRows(ReplacedMethod):
    """The ``generate`` of an injected model."""

    name = "generate"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        drop_interrupted()
        active, names = self.adapters.active, kwargs.get(NAMES)
        if names is None:
            check_order(active)
        rest, outer = without_names(kwargs), chosen(active) if active.row_calls else None
        if LENGTHS in kwargs or (names is None and isinstance(outer, PackedChoice)):
            raise ValueError(
                f"{self.caller}: {LENGTHS} is for calls of the model; generate and generate_batch take a "
                "name for each prompt"
            )
        values, caller = values_of(args, kwargs), self.caller
        if names is None and outer is not None:
            check_media(caller, self.model, outer, values)
        if names is None and not (active.invoked if outer is None else is_invoked(outer)):
            return self.original(*args, **rest)
        choice = choice_of_call(self.model, self.adapters, values, None, outer, caller)
        check_media(caller, self.model, choice, values)  # generate computes them before it calls the model
        if outer is not None and names is None:  # a name may be for several prompts, with other places
            choice = choice.repeated(multiples(caller, self.model, choice, values)[0])
        with choosing(choice):
            if is_invoked(choice):
                choice.starts = find_starts(values, choice.names_of_rows, invocations_of(choice), caller)
                choice.prompt = tokens_in_row(values, caller)
            return self.original(*args, **rest)
