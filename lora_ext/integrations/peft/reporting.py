"""Reports which of a model's PEFT layers run on the ops, and why the others do not."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from peft.tuners.lora import LoraLayer
from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.messages import first_lines
from lora_ext.integrations.peft.merging import ExactMerging, why_not_merge
from lora_ext.integrations.peft.swap import accelerated_class, is_accelerated, lora_layers
from lora_ext.nn.input_groups import InputGroups, input_groups

_PER_CALL = (
    "Calls with extra arguments, under torch.func, in forward-mode differentiation and while a model is traced or "
    "exported run PEFT's code, and so do embeddings and convolutions with adapter_names."
)
_NOT_ACCELERATED = "accelerate() was not called since PEFT made the layer"
_ATTENTION = "PEFT's MultiheadAttention merges before and unmerges after each forward of the base layer"


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One LoRA layer, by its path in the model and PEFT's class, for example ``"Linear"``.

    Attributes:
        forward: why calls run PEFT's forward now, or "" if they run the ops. Reasons that begin with "now:" depend on
            the layer's state, such as merged or disabled adapters.
        merge: why ``merge`` and ``unmerge`` are PEFT's, or "" if they are exact.
    """

    path: str
    kind: str
    forward: str
    merge: str

    @property
    def accelerated(self) -> bool:
        """True if the next forward runs the ops."""
        return not self.forward


@dataclasses.dataclass(frozen=True)
class Report:
    """All LoRA layers of a model, in its order, and which are computed together; ``print`` shows a summary."""

    layers: tuple[LayerReport, ...]
    groups: InputGroups

    def __iter__(self) -> Iterator[LayerReport]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:
        if not self.layers:
            return "no PEFT LoRA layers"
        lines = []
        for heading, attribute in (("forward and backward", "forward"), ("merge and unmerge", "merge")):
            by_reason: dict[str, list[LayerReport]] = defaultdict(list)
            for layer in self.layers:
                by_reason[getattr(layer, attribute)].append(layer)
            lines.append(f"{heading}: {len(by_reason.pop('', []))} of {len(self.layers)} LoRA layers on lora_ext's ops")
            for reason, layers in by_reason.items():
                lines.append(f"  {len(layers)} in PEFT's code: {reason}")
                lines += first_lines(f"{layer.path} ({layer.kind})" for layer in layers)
        lines += [str(self.groups)] if self.groups else []
        return "\n".join([*lines, _PER_CALL])


@checked
def report(model: nn.Module) -> Report:
    """Reports what every PEFT LoRA layer in ``model`` runs on, accelerated or not.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    return Report(tuple(_of_layer(path, layer) for path, layer in lora_layers(model)), input_groups(model))


def _of_layer(path: str, layer: LoraLayer) -> LayerReport:
    kind = type(layer).__name__
    if not is_accelerated(layer):
        reason = _NOT_ACCELERATED
        if accelerated_class(type(layer)) is None:
            module = type(layer).__module__
            reason = _ATTENTION if kind == "MultiheadAttention" else f"lora_ext has no counterpart of {module}.{kind}"
        return LayerReport(path, kind, reason, reason)
    if "forward" in vars(layer):
        forward = "the layer's forward was replaced on the instance, for example by a hook"
    elif type(layer.get_base_layer()) is nn.modules.linear.NonDynamicallyQuantizableLinear:
        forward = "belongs to a MultiheadAttention, which reads the weight and does not call the layer"
    else:
        forward = layer.why_not_forward()
    merge = "PEFT adds the update to the base layer's parameter (target_parameters)"
    if isinstance(layer, ExactMerging):
        names = sorted({*layer.lora_A, *layer.lora_embedding_A})
        merge = next(filter(None, (why_not_merge(layer, name) for name in names)), "")
    return LayerReport(path, kind, forward, merge)
