"""The layers that adapters update, with their factors and the base's weights. Tensors are read when asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from lora_ext._common.messages import listed, shown
from lora_ext._common.modules import KEY_PREFIX
from lora_ext.checkpoints.changes import find_changes
from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.files.contents import AdapterContents, LowRankUpdate


class LayerWeight(NamedTuple):
    """A matrix of a checkpoint: the tensor ``key``, or the matrix number ``index`` of the stack that it holds.

    ``shape`` is ``(rows, columns)`` as stored, which is ``[in, out]`` if ``transposed``, as in Conv1D and Embedding.
    """

    checkpoint: Checkpoint
    key: str
    shape: tuple[int, int]
    index: int
    transposed: bool

    @property
    def layout(self) -> str:
        return "[in, out]" if self.transposed else "[out, in]"

    def read(self) -> Tensor:
        """Reads the matrix as stored, into new memory."""
        rows, columns = self.shape
        return self.checkpoint.rows(self.key, columns, self.index * rows, (self.index + 1) * rows)


class LayerFactors(NamedTuple):
    """One adapter's update of a layer, without the scaling: mapped factors, which are read when they are used."""

    update: LowRankUpdate
    lora_A: Tensor  # [r, in]
    lora_B: Tensor  # [out, r]


class Layer(NamedTuple):
    """A weight that at least one adapter updates."""

    name: str  # path of the module, followed by ``[i]`` if it holds several matrices
    factors: Mapping[int, LayerFactors]  # by the number of the adapter, for the adapters that update this layer
    weight: LayerWeight | None  # None if there is no base


def find_layers(
    adapters: Sequence[AdapterContents], base: Checkpoint | None, *, fan_in_fan_out: bool | None = None
) -> list[Layer]:
    """Finds the layers that adapters update by low-rank factors, in the order of the adapters' files; reads no tensor.

    ValueError: an adapter does not fit ``base``, or the adapters do not fit each other (the message lists all misfits);
    an adapter rescales weights (DoRA).
    """
    layers: dict[str, Layer] = {}
    problems = []
    for number, contents in enumerate(adapters):
        if "use_dora" in contents.options:
            raise ValueError(
                f"{contents.file.directory} is a DoRA adapter (use_dora), which rescales the weights that it is added "
                "to; give one without it"
            )
        weights = {} if base is None else _weights(contents, base, fan_in_fan_out)
        counts = Counter(update.path for update in contents.updates)
        for update in contents.updates:
            path = update.path
            if counts[path] > 1:  # several parameters of one module: the depth of wrapping distinguishes them
                path = update.key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]
            for index, (A, B) in enumerate(update.factors()):
                name = f"{path}[{index}]" if update.matrices > 1 else path
                weight = weights[update][index] if update in weights else None
                layer = layers.setdefault(name, Layer(name, {}, weight))
                layer.factors[number] = LayerFactors(update, A, B)
                shapes = {one.update.shape for one in layer.factors.values()}
                if len(shapes) > 1:
                    problems.append(f"{name} has the shapes {shown(sorted(map(list, shapes)))}")
                elif layer.weight != weight:
                    found = " and ".join(sorted(f"{one.key} {one.layout}" for one in (layer.weight, weight)))
                    problems.append(f"{name} is {found}: say which (--fan-in-fan-out)")
    if problems:
        raise ValueError(f"the adapters are not of one model:{listed(problems)}")
    return [*layers.values()]


def _weights(
    contents: AdapterContents, base: Checkpoint, fan_in_fan_out: bool | None
) -> dict[LowRankUpdate, list[LayerWeight]]:
    """The matrices that the adapter updates."""
    factors = dataclasses.replace(contents, tokens={}, replaced={}, options=frozenset())
    found = {}
    for change in find_changes(base, [factors], fan_in_fan_out=fan_in_fan_out).values():
        for update, _, transposed in change.terms:
            shape = update.shape[::-1] if transposed else update.shape
            found[update] = [
                LayerWeight(base, change.source, shape, index, transposed) for index in range(update.matrices)
            ]
    return found
