"""The forward of PEFT's layers around a parameter (target_parameters): no tensor of the parameter's size is made."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from lora_ext._ops.checks import FLOATING
from lora_ext.integrations.peft.eligibility import NONE_ACTIVE, is_eligible_call, why_not_now
from lora_ext.nn.base_layer import runs_alone
from lora_ext.nn.parameter_view import ExpertUpdate, NeedsWholeError, call_with_updates


class ParameterForward:
    """Overrides ``forward`` of a LoRA layer around a module; PEFT replaces the parameter by its sum with the update."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        updates = _updates(self)
        if isinstance(updates, str) or kwargs.get("adapter_names") is not None or not is_eligible_call(x):
            return super().forward(x, *args, **kwargs)
        try:
            # As in PEFT, an adapted parameter of three dimensions and no swap is [experts, in, out]; 0.18 never swaps.
            is_swapped = getattr(self, "_did_swap_in_out_features", False)
            is_transposed = self.get_param().dim() == 3 and not is_swapped
            return call_with_updates(
                self.base_layer, self.get_base_layer(), self.parameter_name, updates, (x, *args), kwargs, is_transposed
            )
        except NeedsWholeError:
            return super().forward(x, *args, **kwargs)

    def why_not_forward(self) -> str:
        """Returns why calls run PEFT's code, or ""."""
        updates = _updates(self)
        return updates if isinstance(updates, str) else ""


def _updates(layer: nn.Module) -> list[ExpertUpdate] | str:
    """Returns the updates of the active adapters, or why PEFT's forward runs instead."""
    if reason := why_not_now(layer):
        return reason
    weight = layer.get_base_layer()._parameters.get(layer.parameter_name)
    if type(weight) is not nn.Parameter or weight.dtype not in FLOATING:
        return f"{layer.parameter_name} is not a plain parameter in one of the ops' dtypes"
    updates = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
        if not (runs_alone(lora_A) and runs_alone(lora_B)):
            return f"a factor of adapter {name!r} has hooks or a replaced forward"
        A, B, scaling = lora_A.weight, lora_B.weight, layer.scaling[name]
        if A.dtype != B.dtype or A.dtype not in FLOATING:
            return f"lora_A and lora_B of adapter {name!r} are {A.dtype} and {B.dtype}"
        A = A.unflatten(0, (layer.num_experts, -1))
        B = B.unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)
        if isinstance(scaling, Tensor):  # as PEFT's prepare_model_for_compiled_hotswap leaves it
            B, scaling = B * scaling, 1.0
        elif not math.isfinite(scaling):
            return f"the scaling of adapter {name!r} is {scaling}"
        updates.append(ExpertUpdate(A, B, scaling))
    return updates or NONE_ACTIVE
