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

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile
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

    def layouts(self, file: AdapterFile) -> set[bool]:
        """Returns the layouts that the shapes in the file fit: True is the one with exchanged factors."""
        (rank, in_features), (out_features, _) = self.adapter.lora_A.shape, self.adapter.lora_B.shape
        shapes = {
            False: ((rank, in_features), (out_features, rank)),
            True: ((rank, out_features), (in_features, rank)),
        }
        in_file = file.shape(self.key_A), file.shape(self.key_B)
        return {is_exchanged for is_exchanged, wanted in shapes.items() if in_file == wanted}

    def exchanged(self, file: AdapterFile) -> dict[str, Tensor]:
        """Returns exchanged factors: lora_A concatenates the experts' ranks, lora_B interleaves them."""
        A, B, r = file.tensor(self.key_A), file.tensor(self.key_B), self.adapter.r
        return {
            self.key_A: B.unflatten(1, (r, -1)).permute(2, 1, 0).flatten(0, 1),
            self.key_B: A.unflatten(0, (-1, r)).permute(2, 1, 0).flatten(1),
        }


def with_version(adapter: Adapter, values: dict[str, Any]) -> dict[str, Any]:
    """Returns ``values``, the config of a file, with the ``peft_version`` of the layout, if the adapter has experts."""
    version = _parsed(values.get(_VERSION))
    if not any(_pairs(adapter)) or (version is not None and version >= _parsed(PRESENT)):
        return values
    return values | {_VERSION: PRESENT}


def in_present_layout(adapter: Adapter, file: AdapterFile, caller: str) -> AdapterFile:
    """Returns ``file`` with the factors of experts in the present layout, for loading into ``adapter``.

    ValueError: nothing tells the layout of square experts.
    """
    pairs = [pair for pair in _pairs(adapter) if pair.key_A in file and pair.key_B in file]
    version = _parsed(file.config.get(_VERSION))
    known: dict[bool, set[bool]] = {False: set(), True: set()}  # by how the weight is stored
    for pair in pairs:
        if len(layouts := pair.layouts(file)) == 1:
            known[pair.stores_transposed] |= layouts
    tensors, problems = dict(file.tensors), []
    for pair in pairs:
        layouts, by_version = pair.layouts(file), _layouts_of(version, pair.stores_transposed)
        if len(layouts) == 2:  # the experts are square
            others = known[pair.stores_transposed]
            layouts = others if len(others) == 1 else by_version
        if len(layouts) == 2:
            problems.append(f"{pair.key_A} {list(file.shape(pair.key_A))}")
        elif True in layouts & by_version:  # otherwise its shapes are reported with those of other layers
            tensors |= pair.exchanged(file)
    if problems:
        raise ValueError(
            f"{caller}: {file.path} has square experts, so that shapes do not tell the layout of their factors; set "
            f'{_VERSION} in {CONFIG_FILE} to the version that saved the adapter ("{PRESENT}": the present layout; '
            f'"0.18.0": the one before), now {shown(file.config.get(_VERSION))}:{listed(problems)}'
        )
    return dataclasses.replace(file, tensors=tensors)


def _pairs(adapter: Adapter) -> Iterator[_Pair]:
    for part in adapter.parts:
        if isinstance(part.layer, LoraParameter) and part.layer.weight.dim() == 3:
            A, B = part.layer.file_tensors(part.file_path, part.adapter)
            yield _Pair(f"{KEY_PREFIX}{A}", f"{KEY_PREFIX}{B}", part.adapter, part.layer.stores_transposed)


def _layouts_of(version: tuple[int, ...] | None, stores_transposed: bool) -> set[bool]:
    """Returns whether files of a version of PEFT have the factors exchanged; both if that is not known."""
    if version is None or version == (0, 19, 1, 0):  # a development version from before or after the change
        return {False, True}
    if version >= _parsed(PRESENT):
        return {False}
    return {not stores_transposed or version >= (0, 19, 0, 0)}


def _parsed(version: object) -> tuple[int, int, int, int] | None:
    """Returns three numbers, and 0 for a version before the release, otherwise 1; None for anything else."""
    text = version if isinstance(version, str) else ""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(\.?(?:dev|rc|a|b))?", text)
    return None if found is None else (*map(int, found.groups()[:3]), int(found[4] is None))
