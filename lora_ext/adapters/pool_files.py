"""Reads adapters for a pool: PEFT's files whose adapters are low-rank updates of the pool's linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_ext._common.printable import listed
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.misfits import misfits
from lora_ext.injection.all_linear import is_all_linear
from lora_ext.matching.path_patterns import LayerNumbers, PathMatcher

_OTHER_PARTS = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "use_dora")


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """Describes the layers and the rank that a pool has room for.

    Attributes:
        layers: ``(in_features, out_features)`` of its layers, by path in the model.
        r: the largest rank.
        head: the path of the model's output head, or None.
    """

    layers: Mapping[str, tuple[int, int]]
    r: int
    head: str | None


def read_adapter(directory: Path, shape: PoolShape) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Returns the adapter in ``directory`` by the paths of its layers: ``lora_A``, ``lora_B`` and the scaling.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ValueError: a file is corrupted, its config is not supported, or the adapter does not fit the pool: other
            layers, shapes, a larger rank, or parts that are no low-rank updates. The message lists what.
    """
    file = AdapterFile.open(directory, caller="AdapterPool")
    config = file.lora_config("AdapterPool")
    parts = [name for name in _OTHER_PARTS if getattr(config, name)] + ["bias"] * (config.bias != "none")
    problems = [f"{name}: a pool holds low-rank updates of linear layers" for name in parts]
    keys, targets = {}, {}
    for path in _named(config, shape):  # a whole file has factors of these layers and no others
        in_features, out_features = shape.layers[path]
        rank = config.rank_for(path)
        if rank > shape.r:
            problems.append(f"rank of {path}: {rank}, above the pool's {shape.r}")
        keys[path] = f"{KEY_PREFIX}{path}.lora_A.weight", f"{KEY_PREFIX}{path}.lora_B.weight"
        for key, sizes in zip(keys[path], ((rank, in_features), (out_features, rank)), strict=True):
            targets[key] = torch.empty(sizes, device="meta")
    problems += misfits(targets, file.tensors)
    if problems or not targets:
        base = file.config.get("base_model_name_or_path")
        raise ValueError(
            f"AdapterPool: {file.path} does not fit the pool of rank {shape.r} (its base model is {base!r}); load it "
            "with load_adapter, or make a pool with its layers and rank:"
            f"{listed(problems or ['it has no factors'])}"
        )
    file.warn_of_damage(targets)
    return {path: (file.tensors[A], file.tensors[B], config.scaling_for(path)) for path, (A, B) in keys.items()}


def _named(config: LoraConfig, shape: PoolShape) -> list[str]:
    """Returns those of the pool's layers that ``config`` targets."""
    is_every = is_all_linear(config)
    matches = PathMatcher("target_modules", config.target_modules)
    is_excluded = PathMatcher("exclude_modules", config.exclude_modules)
    whole = () if isinstance(config.target_modules, str) else config.target_modules or ()
    numbers = LayerNumbers(config.layers_to_transform, config.layers_pattern, whole)
    targets = (path for path in shape.layers if (path != shape.head if is_every else matches(path)))
    return [path for path in targets if path in numbers and not is_excluded(path)]
