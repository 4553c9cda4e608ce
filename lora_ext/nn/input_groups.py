"""Finds the layers of a model that may read one tensor, and reports which of them are computed together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.printable import first_lines
from lora_ext._common.wrapped import root_module
from lora_ext.nn.shared_inputs import LARGEST, Neighbours, SharesInputs, neighbours_of, set_neighbours

NOT_YET = "not called together yet"
APART = "not called with the tensor of the other layers of its module"
ANOTHER_WAY = (
    "now: it is merged, compiled or called with hooks, has no or several adapters, or differs from the others in its "
    "dropout, dtype, device or quantisation"
)


@dataclasses.dataclass(frozen=True)
class InputGroup:
    """Layers of one module that are computed together, or one layer that is not.

    Attributes:
        paths: their paths in the model.
        reason: why not, or "". One that begins with "now:" depends on the layers' state.
    """

    paths: tuple[str, ...]
    reason: str = ""

    @property
    def shared(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True)
class InputGroups:
    """All layers of a model that may share inputs, in groups; ``print`` shows a summary."""

    groups: tuple[InputGroup, ...]

    def __iter__(self) -> Iterator[InputGroup]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __str__(self) -> str:
        by_reason: dict[str, list[InputGroup]] = defaultdict(list)
        for group in self.groups:
            by_reason[group.reason].append(group)
        shared = by_reason.pop("", [])
        layers = sum(len(group.paths) for group in shared)
        lines = [f"shared inputs: {layers} layers in {len(shared)} groups are computed together"]
        lines += first_lines(", ".join(group.paths) for group in shared)
        for reason, groups in by_reason.items():
            paths = [path for group in groups for path in group.paths]
            lines += [f"  {len(paths)} alone: {reason}", *first_lines(paths)]
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
    reports, seen = [], set()
    for module in list(model.modules()):
        neighbours = neighbours_of(module) if isinstance(module, SharesInputs) else None
        if neighbours is None or id(module) in seen:
            continue
        keys = [key for key in neighbours.layers if key in neighbours.groups[id(module)] and key in paths]
        seen.update(keys)
        reports += [InputGroup((paths[keys[0]],), APART)] if len(keys) == 1 else _of_group(neighbours, keys, paths)
    return InputGroups(tuple(reports))


def _of_group(neighbours: Neighbours, keys: list[int], paths: dict[int, str]) -> Iterator[InputGroup]:
    together, first = [], None
    for key in keys:
        layer = neighbours.layers[key]()
        operands = None if layer is None else layer.operands()
        if operands is None or not (first is None or operands.fit(first)):
            yield InputGroup((paths[key],), ANOTHER_WAY)
        else:
            first = first or operands
            together.append(key)
    if together:
        reason = ANOTHER_WAY if len(together) == 1 else "" if neighbours.shared.issuperset(together) else NOT_YET
        yield InputGroup(tuple(paths[key] for key in together), reason)
