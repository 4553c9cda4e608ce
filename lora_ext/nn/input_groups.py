"""Finds the layers of a model that may read one tensor, and reports which of them are computed together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.messages import first_lines
from lora_ext._common.modules import root_module
from lora_ext.nn.shared_inputs import LARGEST, Neighbours, SharesInputs, neighbours_of, set_neighbours


@dataclasses.dataclass(frozen=True)
class InputGroups:
    """The layers of a model that may share inputs, by their paths; ``print`` shows a summary.

    Attributes:
        together: groups of layers that are computed together.
        alone: the others. They were not called with one tensor yet, or read others; or they are merged, compiled or
            called with hooks now, have no or several adapters, or differ in dropout, dtype, device or quantisation.
    """

    together: tuple[tuple[str, ...], ...]
    alone: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.together or self.alone)

    def __str__(self) -> str:
        layers = sum(map(len, self.together))
        lines = [f"shared inputs: {layers} layers in {len(self.together)} groups are computed together"]
        lines += first_lines(", ".join(paths) for paths in self.together)
        if self.alone:
            lines += [f"  {len(self.alone)} alone", *first_lines(self.alone)]
        return "\n".join(lines)


def form_input_groups(model: nn.Module, on: bool, kinds: tuple[type[SharesInputs], ...]) -> None:
    """Lets layers of exactly these ``kinds`` share inputs: those of one module with equal ``in_features``.

    The layers of an ``nn.Sequential`` follow each other, and share none. Groups with the same layers as before stay.
    """
    for module in list(model.modules()):
        by_size: dict[int, list[SharesInputs]] = defaultdict(list)
        for child in module._modules.values():
            if type(child) in kinds and child not in by_size[child.in_features]:
                by_size[child.in_features].append(child)
        may_share = on and not isinstance(module, nn.Sequential)
        for found in by_size.values():
            for i in range(0, len(found), LARGEST):
                layers = found[i : i + LARGEST]
                if not may_share or len(layers) == 1:
                    neighbours = None
                elif _are_neighbours(layers):
                    continue
                else:
                    neighbours = Neighbours()
                for layer in layers:
                    set_neighbours(layer, neighbours)


def _are_neighbours(layers: list[SharesInputs]) -> bool:
    of_first, *others = map(neighbours_of, layers)
    return of_first is not None and all(o is of_first for o in others) and len(of_first.groups) == len(layers)


@checked
def input_groups(model: nn.Module) -> InputGroups:
    """Reports which layers of ``model`` read one tensor and are computed together.

    Listed are linear layers of one module with equal ``in_features``, adapted by :func:`lora_ext.inject` or by PEFT and
    ``accelerate``. In compiled graphs, every layer is computed alone.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    paths = {id(module): path for path, module in root_module(model).named_modules()}
    together, alone, seen = [], [], set()
    for module in list(model.modules()):
        neighbours = neighbours_of(module) if isinstance(module, SharesInputs) else None
        if neighbours is None or id(module) in seen:
            continue
        keys = [key for key in neighbours.layers if key in neighbours.groups[id(module)] and key in paths]
        seen.update(keys)
        found = neighbours.computed_together(keys)
        together += [tuple(paths[key] for key in found)] if found else []
        alone += [paths[key] for key in keys if key not in found]
    return InputGroups(tuple(together), tuple(alone))
