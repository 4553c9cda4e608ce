"""Reads adapters for a pool: PEFT's files whose adapters are low-rank updates of the pool's linear layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from lora_ext._common.printable import first_shape, listed
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.save_load import with_positive_alphas
from lora_ext.injection.all_linear import names_next_to_all_linear
from lora_ext.matching.path_patterns import LayerNumbers, PathMatcher

_SUFFIXES = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B"}


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """What a pool stores of an adapter.

    Attributes:
        layers: ``(in_features, out_features)`` of its layers, by path in the model.
        r: the largest rank.
        head: the path of the model's output head, or None.
    """

    layers: Mapping[str, tuple[int, int]]
    r: int
    head: str | None


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """One layer's part of an adapter: ``[rank, in_features]``, ``[out_features, rank]`` and a factor."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float


def read_adapter(directory: Path, shape: PoolShape) -> dict[str, LayerUpdate]:
    """Returns the updates of the adapter in ``directory``, by the path of their layer.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ValueError: a file is corrupted, its config is not supported, or the adapter does not fit the pool: other
            layers, shapes, a larger rank, or parts that are no low-rank updates. The message lists what.
    """
    file = with_positive_alphas(AdapterFile.open(directory, caller="AdapterPool"), "AdapterPool")
    config = file.lora_config("AdapterPool")
    problems = _other_parts(config)
    keys: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118  not a dict
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        path = "" if suffix is None else key.removeprefix(KEY_PREFIX).removesuffix(suffix)
        if path in shape.layers:
            keys.setdefault(path, {})[_SUFFIXES[suffix]] = key
        else:
            problems.append(f"unexpected key: {key}")
    named = _named(config, shape)
    problems += [f"missing key: {KEY_PREFIX}{path}.lora_A.weight" for path in shape.layers if path in named - {*keys}]
    for path, factors in keys.items():
        if path not in named:
            key = next(iter(factors.values()))
            problems.append(f"unexpected key: {key}, of a layer that the config does not name")
        problems += _misfits(file, path, factors, config.rank_for(path), shape)
    if problems or not keys:
        base = file.config.get("base_model_name_or_path")
        raise ValueError(
            f"AdapterPool: {file.path} does not fit the pool of rank {shape.r} (its base model is {base!r}); load it "
            "with load_adapter, or make a pool with its layers and rank:"
            f"{listed(first_shape(problems or ['it has no factors']))}"
        )
    file.warn_of_damage(key for factors in keys.values() for key in factors.values())
    updates = {}
    for path, factors in keys.items():
        lora_A, lora_B = (file.tensors[factors[name]] for name in ("lora_A", "lora_B"))
        updates[path] = LayerUpdate(lora_A, lora_B, config.scaling_for(path))
    return updates


def _other_parts(config: LoraConfig) -> list[str]:
    parts = ("modules_to_save", "trainable_token_indices", "target_parameters", "lora_bias", "use_dora")
    problems = [name for name in parts if getattr(config, name)]
    problems += ["bias"] if config.bias != "none" else []
    return [f"{name}: a pool holds low-rank updates of linear layers" for name in problems]


def _named(config: LoraConfig, shape: PoolShape) -> set[str]:
    """Returns those of the pool's layers that ``config`` targets: a whole file has factors of these and no others."""
    others = names_next_to_all_linear(config)
    matches = PathMatcher("target_modules", config.target_modules if others is None else others)
    is_excluded = PathMatcher("exclude_modules", config.exclude_modules)
    whole = () if isinstance(config.target_modules, str) else config.target_modules or ()
    numbers = LayerNumbers(config.layers_to_transform, config.layers_pattern, whole)
    targets = (path for path in shape.layers if matches(path) or (others is not None and path != shape.head))
    return {path for path in targets if path in numbers and not is_excluded(path)}


def _misfits(file: AdapterFile, path: str, factors: Mapping[str, str], rank: int, shape: PoolShape) -> list[str]:
    """Returns what is wrong with the factors of the layer at ``path``."""
    if missing := [name for name in ("lora_A", "lora_B") if name not in factors]:
        return [f"missing key: {KEY_PREFIX}{path}.{missing[0]}.weight"]
    if rank > shape.r:
        return [f"rank of {path}: {rank}, above the pool's {shape.r}"]
    in_features, out_features = shape.layers[path]
    problems = []
    for name, wanted in (("lora_A", (rank, in_features)), ("lora_B", (out_features, rank))):
        key = factors[name]
        if (found := file.shape(key)) != wanted:
            problems.append(f"shape of {key}: {list(found)} in the file, {list(wanted)} in the pool")
        if not file.dtype(key).is_floating_point:
            problems.append(f"dtype of {key}: {file.dtype(key)}, want floating-point numbers")
    return problems
