"""``lora-ext diff``: compares two adapters, or two checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ext._ops.checks import FLOATING
from lora_ext.checkpoints.checkpoint_files import Checkpoint, raw_blocks
from lora_ext.checkpoints.merged_rows import BLOCK_BYTES
from lora_ext.checkpoints.other_files import read_model_config
from lora_ext.files.adapter_file import WEIGHTS_FILE, AdapterFile, holds_adapter
from lora_ext.files.file_bytes import tensor_bytes
from lora_ext.files.safetensors_format import DTYPES, TensorInfo

_UNSET = "(absent)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """The differences between ``a`` and ``b``; false if there are none.

    Attributes:
        only_a, only_b: keys that the other lacks.
        kinds: key -> ``[dtype and shape in a, in b]`` of tensors whose dtype or shape differ; values are not compared.
        values: key -> differences of tensors that differ in any bit: ``max_abs``, the largest difference of two
            elements, and ``relative``, the Frobenius norm of the difference over that of ``a``. Both are None for
            integers and 8-bit dtypes.
        config: key -> ``[in a, in b]``, of ``adapter_config.json`` or ``config.json``.
        equal: number of equal tensors.
    """

    only_a: list[str]
    only_b: list[str]
    kinds: dict[str, list[str]]
    values: dict[str, dict[str, float | None]]
    config: dict[str, list[Any]]
    equal: int

    def __bool__(self) -> bool:
        return bool(self.only_a or self.only_b or self.kinds or self.values or self.config)


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Difference:
    """Compares two directories (or safetensors files) bit by bit. Holds some rows of a tensor in memory at a time.

    Raises:
        FileNotFoundError, ValueError: one is neither an adapter nor a checkpoint, or is corrupted; or one is an adapter
            and the other a checkpoint.
    """
    a, b = Path(a), Path(b)
    for path in (a, b):
        if not os.path.lexists(path):
            raise FileNotFoundError(f"{path} is missing; want the directory of an adapter or a checkpoint, or a file")
    kinds = ["adapter" if holds_adapter(path) else "checkpoint" for path in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError(f"diff: {a} is {_article(kinds[0])} and {b} is {_article(kinds[1])}: nothing to compare")
    if kinds[0] == "adapter":
        configs = [_ordered(AdapterFile.open(path, caller="diff").config) for path in (a, b)]
        first, second = Checkpoint.open(a / WEIGHTS_FILE), Checkpoint.open(b / WEIGHTS_FILE)
    else:
        first, second = Checkpoint.open(a), Checkpoint.open(b)
        configs = [_model_config(checkpoint) for checkpoint in (first, second)]
    different, values, equal = {}, {}, 0
    for key in first:
        if key not in second:
            continue
        infos = first.info(key), second.info(key)
        if (infos[0].dtype, infos[0].shape) != (infos[1].dtype, infos[1].shape):
            different[key] = [f"{info.dtype} {list(info.shape)}" for info in infos]
        elif (measured := _compare(first.file(key), infos[0], second.file(key), infos[1])) is not None:
            values[key] = measured
        else:
            equal += 1
    for checkpoint in (first, second):
        checkpoint.check_unchanged("diff")
    return Difference(
        [key for key in first if key not in second],
        [key for key in second if key not in first],
        different,
        values,
        {
            key: [config.get(key, _UNSET) for config in configs]
            for key in sorted(configs[0].keys() | configs[1].keys())
            if configs[0].get(key, _UNSET) != configs[1].get(key, _UNSET)
        },
        equal,
    )


def _compare(a: Path, info_a: TensorInfo, b: Path, info_b: TensorInfo) -> dict[str, float | None] | None:
    """The entry of ``Difference.values`` for two tensors; None if every bit is the same."""
    dtype = DTYPES.get(info_a.dtype)
    is_same, largest, square, norm = True, 0.0, 0.0, 0.0
    for x, y in zip(raw_blocks(a, info_a, BLOCK_BYTES), raw_blocks(b, info_b, BLOCK_BYTES), strict=True):
        same = tensor_bytes(x) == tensor_bytes(y)
        is_same = is_same and same
        if dtype not in FLOATING:
            continue
        x, y = x.view(dtype).double(), y.view(dtype).double()
        norm += x.square().sum().item()
        if not same:
            difference = y - x
            largest = _larger(largest, difference)
            square += difference.square().sum().item()
    if is_same:
        return None
    if dtype not in FLOATING:
        return {"max_abs": None, "relative": None}
    relative = math.sqrt(square / norm) if norm > 0 else math.inf if square > 0 else 0.0
    return {"max_abs": largest, "relative": relative}


def _larger(largest: float, difference: Tensor) -> float:
    here = difference.abs().max().item()
    return here if math.isnan(here) else max(largest, here)


def _model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    return (read_model_config(checkpoint) or {}) if checkpoint.is_directory else {}


def _ordered(config: dict[str, Any]) -> dict[str, Any]:
    """Sorts the names of modules in a config: they are a set, which PEFT writes in any order."""
    return {
        key: sorted(value, key=repr)
        if key.endswith(("_modules", "modules_to_save")) and isinstance(value, list)
        else value
        for key, value in config.items()
    }


def _article(kind: str) -> str:
    return "an adapter" if kind == "adapter" else "a checkpoint"
