"""``model.generate(..., adapter_names=[...])``: an adapter for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lora_ext.model.rows.arguments import LENGTHS, NAMES, position, tokens_in_row, values_of, without_names
from lora_ext.model.rows.calls import check_media, choice_of_call, invocations_of, is_invoked, multiples
from lora_ext.model.rows.invocations import find_starts
from lora_ext.model.rows.replaced_method import ReplacedMethod
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.rows.choice import RowChoice
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
        if names is None and not (active.invoked if outer is None else is_invoked(outer)):
            if outer is not None:
                self._prepare(outer, values)
            return self.original(*args, **rest)
        choice = choice_of_call(self.model, self.adapters, values, None, outer, caller)
        self._prepare(choice, values)
        if outer is not None and names is None:  # a name may be for several prompts, with other places
            choice = choice.repeated(multiples(caller, self.model, choice, values)[0])
        with choosing(choice):
            if is_invoked(choice):
                choice.starts = find_starts(values, choice.names_of_rows, invocations_of(choice), caller)
                choice.prompt = tokens_in_row(values, caller)
            return self.original(*args, **rest)

    def _prepare(self, choice: RowChoice, values: Mapping[str, Any]) -> None:
        """Checks that the batch keeps its rows, and notes how many sequences may belong to one.

        ValueError: images are not spread over them, or some may drop out.
        """
        config = values.get("generation_config") or getattr(self.model, "generation_config", None)
        counts = [values.get(name, getattr(config, name, None)) for name in ("num_beams", "num_return_sequences")]
        # Where generate calls a part of the model (BLIP-2), no call of the model counts the sequences.
        choice.multiples |= {max(count if isinstance(count, int) else 1 for count in counts)}
        check_media(self.caller, self.model, choice, values)  # generate computes images before it calls the model
        if len(set(choice.rows)) < 2 or not hasattr(self.model, "generate_with_fallback"):  # Whisper's
            return
        asked = {name: values.get(name, getattr(config, name, None)) for name in _OF_WHISPER}
        encoder, frames = self.model.get_encoder(), values.get("input_features", values.get(position(1)))
        strides = innermost(encoder.conv1).stride[0] * innermost(encoder.conv2).stride[0]
        segment = asked["num_segment_frames"] or strides * self.model.config.max_source_positions
        is_long = isinstance(frames, Tensor) and frames.shape[-1] > segment
        may_repeat = (is_long or asked["return_timestamps"]) and not asked["force_unique_generate_call"]
        if may_repeat or isinstance(asked["temperature"], list | tuple):
            raise ValueError(
                f"{self.caller}: adapter_names: with more than one segment ({segment} frames), timestamps or several "
                "temperatures, rows drop out of the batch when they are done; pass one segment of each row and "
                "force_unique_generate_call=True, or call it once for each adapter (set_adapter)"
            )


_OF_WHISPER = "num_segment_frames", "return_timestamps", "force_unique_generate_call", "temperature"
