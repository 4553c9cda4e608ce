"""The layouts in which PEFT's files hold the factors of stacked experts.

Files of PEFT 0.19.1 and newer have ``lora_A [r * num_experts, in_features]`` and ``lora_B [out_features, r *
num_experts]``, the present layout. For parameters stored as ``[num_experts, out_features, in_features]``, PEFT 0.17 to
0.19.0 took the sizes for the reverse: ``lora_A [r * num_experts, out_features]`` and ``lora_B [in_features, r *
num_experts]``, whose product is the transposed update. PEFT 0.19.0 did so for the others, ``[num_experts, in_features,
out_features]``, too. Exchanging the two factors converts one layout to the other.

Shapes tell the layouts apart, except those of square matrices: then other experts in the file do, or its
``peft_version``, which PEFT writes since 0.18.0.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile, Tensors, TensorsView
from lora_ext.model.adapter_set import Adapter
from lora_ext.nn.adapter import LoraAdapter
from lora_ext.nn.parameter import LoraParameter

PRESENT = "0.19.1"
"""The first version of PEFT that writes the present layout."""
_VERSION = "peft_version"


class _Pair(NamedTuple):
    """The factors of the experts of one parameter: keys of the file, and the adapter in the model."""

    key_A: str
    key_B: str
    adapter: LoraAdapter
    stores_transposed: bool

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of ``lora_A`` and ``lora_B`` in the present layout."""
        return tuple(self.adapter.lora_A.shape), tuple(self.adapter.lora_B.shape)

    @property
    def exchanged_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in the other layout."""
        (rank, in_features), (out_features, _) = self.shapes
        return (rank, out_features), (in_features, rank)


def with_version(adapter: Adapter, values: dict[str, Any]) -> dict[str, Any]:
    """Returns ``values``, the config of a file, with the ``peft_version`` of the layout, if the adapter has experts."""
    version = _parsed(values.get(_VERSION))
    if not any(_pairs(adapter)) or (version is not None and version >= _parsed(PRESENT)):
        return values
    return values | {_VERSION: PRESENT}


def in_present_layout(adapter: Adapter, file: AdapterFile, caller: str) -> AdapterFile:
    """Returns ``file`` with the factors of experts in the present layout, for loading into ``adapter``.

    Raises:
        ValueError: nothing tells the layout of square experts; or the file has the other layout than its
            ``peft_version`` says.
    """
    pairs = [pair for pair in _pairs(adapter) if pair.key_A in file and pair.key_B in file]
    exchanged, open_pairs, problems = [], [], []
    known: dict[bool, set[bool]] = {False: set(), True: set()}  # by how the weight is stored: is the pair exchanged?
    version = _parsed(file.config.get(_VERSION))
    for pair in pairs:
        shapes = file.shape(pair.key_A), file.shape(pair.key_B)
        fits = [is_exchanged for is_exchanged in (False, True) if shapes == _shapes(pair, is_exchanged)]
        if len(fits) == 2:
            open_pairs.append(pair)
        elif fits:  # a shape that fits neither is reported with those of other layers
            known[pair.stores_transposed].update(fits)
            if fits[0]:
                exchanged.append(pair)
    if exchanged and version is not None and version >= _parsed(PRESENT):
        problems += [
            f"{pair.key_A} {list(file.shape(pair.key_A))} has the size of out_features, want {list(pair.shapes[0])}; "
            f"{_VERSION} {file.config[_VERSION]} writes no such layout, so the adapter belongs to a model that stores "
            "its experts in another way"
            for pair in exchanged
        ]
    for pair in open_pairs:
        likely = known[pair.stores_transposed]
        if len(likely) != 1:
            likely = _layouts_of(version, pair.stores_transposed)
        if len(likely) != 1:
            problems.append(
                f"{pair.key_A} {list(file.shape(pair.key_A))}: the experts are square, so that the shape does not tell "
                f"the layout; set {_VERSION} in {CONFIG_FILE} to the version that saved the adapter "
                f'("{PRESENT}": the present layout; "0.18.0": the one before), now {shown(file.config.get(_VERSION))}'
            )
        elif likely == {True}:
            exchanged.append(pair)
    if problems:
        raise ValueError(f"{caller}: {file.path} has another layout of experts:{listed(problems)}")
    return AdapterFile(file.directory, file.config, _Exchanged(file.tensors, exchanged)) if exchanged else file


def _pairs(adapter: Adapter) -> Iterator[_Pair]:
    for part in adapter.parts:
        if isinstance(part.layer, LoraParameter) and part.layer.weight.dim() == 3:
            A, B = part.layer.file_tensors(part.file_path, part.adapter)
            yield _Pair(f"{KEY_PREFIX}{A}", f"{KEY_PREFIX}{B}", part.adapter, part.layer.stores_transposed)


def _shapes(pair: _Pair, is_exchanged: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair.exchanged_shapes if is_exchanged else pair.shapes


def _layouts_of(version: tuple[int, ...] | None, stores_transposed: bool) -> set[bool]:
    """Returns whether files of a version of PEFT have the factors exchanged; both if that is not known."""
    if version is None or version == (0, 19, 1, 0):  # a development version from before or after the change
        return {False, True}
    if version >= _parsed(PRESENT):
        return {False}
    return {not stores_transposed or version >= (0, 19, 0, 0)}


def _parsed(version: object) -> tuple[int, int, int, int] | None:
    """Three numbers, and 0 for a version before the release, otherwise 1; None for anything else."""
    found = (
        re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(\.?(?:dev|rc|a|b))?", version) if isinstance(version, str) else None
    )
    return None if found is None else (*map(int, found.groups()[:3]), int(found[4] is None))


class _Exchanged(TensorsView):
    """A view of ``file`` with the factors of some experts exchanged."""

    def __init__(self, file: Tensors, pairs: list[_Pair]) -> None:
        shapes: dict[str, tuple[int, ...]] = {}
        super().__init__(file, shapes)
        self._sources = {}
        for pair in pairs:
            shapes |= dict(zip((pair.key_A, pair.key_B), pair.shapes, strict=True))
            self._sources |= {
                pair.key_A: (pair.key_B, pair.adapter.r, True),
                pair.key_B: (pair.key_A, pair.adapter.r, False),
            }

    def tensor(self, key: str) -> Tensor:
        if key not in self._sources:
            return self._file.tensor(key)
        source, r, is_A = self._sources[key]
        tensor = self._file.tensor(source)
        if is_A:  # lora_A concatenates the experts' ranks, lora_B interleaves them
            return tensor.unflatten(1, (r, -1)).permute(2, 1, 0).flatten(0, 1)
        return tensor.unflatten(0, (-1, r)).permute(2, 1, 0).flatten(1)
