"""Finds the layers of a model that may read one tensor, and reports which of them are computed together."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.printable import first_lines
from lora_ext._common.wrapped import root_module
from lora_ext.nn.linear import OverLinear
from lora_ext.nn.shared_inputs import LARGEST, Group, Neighbours, SharesInputs, neighbours_of, set_neighbours


@dataclasses.dataclass(frozen=True)
class InputGroup:
    """Layers of one module that are computed together, or one layer that is not.

    Attributes:
        paths: their paths in the model.
        reason: why they are not computed together with each other or with their neighbours, or "" if they are. Reasons
            that begin with "now:" depend on the layers' state, such as merged or disabled adapters.
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
        shared = [group for group in self.groups if group.shared]
        layers = sum(len(group.paths) for group in shared)
        lines = [f"shared inputs: {layers} layers in {len(shared)} groups are computed together"]
        lines += first_lines(", ".join(group.paths) for group in shared)
        by_reason: dict[str, list[str]] = defaultdict(list)
        for group in self.groups:
            if not group.shared:
                by_reason[group.reason] += group.paths
        for reason, paths in by_reason.items():
            lines.append(f"  {len(paths)} alone: {reason}")
            lines += first_lines(paths)
        return "\n".join(lines)


def form_input_groups(model: nn.Module, on: bool, kinds: tuple[type[SharesInputs], ...]) -> None:
    """Lets layers of exactly these ``kinds`` share inputs: those of one module with equal ``in_features``.

    The layers of an ``nn.Sequential`` follow each other, and share none. A guess: see :mod:`lora_ext.nn.shared_inputs`.
    Groups whose layers are the same as before keep what calls have taught them.
    """
    for module, found in _of_one_size(model, lambda child: type(child) in kinds):
        for i in range(0, len(found), LARGEST):
            layers = found[i : i + LARGEST]
            if not on or len(layers) < 2 or isinstance(module, nn.Sequential):
                neighbours = None
            elif (neighbours := neighbours_of(layers[0])) is not None and _consists_of(neighbours, layers):
                continue
            else:
                neighbours = Neighbours()
            for layer in layers:
                set_neighbours(layer, neighbours)


def _of_one_size(model: nn.Module, is_wanted: Callable[[nn.Module], bool]) -> Iterator[tuple[nn.Module, list]]:
    """Yields the modules of ``model`` with those of their children that are wanted and have equal ``in_features``."""
    for module in list(model.modules()):
        by_size: dict[int, list[nn.Module]] = defaultdict(list)
        for child in module._modules.values():
            if is_wanted(child) and child not in by_size[child.in_features]:
                by_size[child.in_features].append(child)
        for layers in by_size.values():
            yield module, layers


def _consists_of(neighbours: Neighbours, layers: list[SharesInputs]) -> bool:
    return all(neighbours_of(layer) is neighbours for layer in layers) and len(neighbours.groups) == len(layers)


@checked
def input_groups(model: nn.Module) -> InputGroups:
    """Reports which layers of ``model`` read one tensor and are computed together, and why others are not.

    Layers are listed if they may read one tensor: linear layers of one module with equal ``in_features``, adapted by
    :func:`lora_ext.inject` or by PEFT and ``accelerate``. Compiled graphs are not reported:
    :func:`lora_ext.compiling.share_inputs` does that.

    Raises:
        TypeError: ``model`` is not an ``nn.Module``.
    """
    paths = {id(module): path for path, module in root_module(model).named_modules()}
    seen: dict[int, Group] = {}
    reports = []
    for module in list(model.modules()):
        neighbours = neighbours_of(module) if isinstance(module, SharesInputs) else None
        group = None if neighbours is None else neighbours.groups.get(id(module))
        if group is not None and id(group) not in seen:
            seen[id(group)] = group
            layers = [layer for layer in group.alive() if id(layer) in paths]
            reports += _of_group(group, neighbours.now, layers, paths)
    reports += _of_no_group(model, paths)
    return InputGroups(tuple(reports))


def _of_no_group(model: nn.Module, paths: dict[int, str]) -> Iterator[InputGroup]:
    """Yields the layers next to others of their size that :func:`form_input_groups` puts into no group."""
    for module, layers in _of_one_size(model, lambda child: isinstance(child, (OverLinear, SharesInputs))):
        if len(layers) < 2 or isinstance(module, nn.Sequential):
            continue
        kinds = [type(layer) for layer in layers]
        for layer, kind in zip(layers, kinds, strict=True):
            if neighbours_of(layer) is not None:
                continue
            if not isinstance(layer, SharesInputs):
                reason = f"layers of its kind ({kind.__name__}) are computed by themselves"
                yield InputGroup((paths[id(layer)],), reason)
            elif kinds.count(kind) == 1:  # of more, share_inputs is off
                yield InputGroup((paths[id(layer)],), "the other layers of its module are of another kind")


def _of_group(group: Group, now: str, layers: list[SharesInputs], paths: dict[int, str]) -> Iterator[InputGroup]:
    together: list[str] = []
    first = None
    for layer in layers:
        path, operands = paths[id(layer)], layer.operands()
        if isinstance(operands, str):
            yield InputGroup((path,), f"now: {operands.removeprefix('now: ')}")
        elif first is not None and (why := operands.why_apart(first)):
            yield InputGroup((path,), f"now: {why}")
        else:
            first = first or operands
            together.append(path)
    if len(together) == 1:
        yield InputGroup(tuple(together), group.why or "the other layers of its module are not computed with it")
    elif together:
        reason = "" if group.is_proven else "not called together yet"
        yield InputGroup(tuple(together), f"now: {now}" if now else reason)
