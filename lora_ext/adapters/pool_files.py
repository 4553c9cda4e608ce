"""Reads adapters for a pool: PEFT's files whose adapters are low-rank updates of the pool's layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from torch import Tensor

from lora_ext._common.printable import first_shape, listed
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.save_load import with_positive_alphas
from lora_ext.injection.targets import names_next_to_all_linear
from lora_ext.matching.path_names import SuffixTable, path_ends
from lora_ext.matching.path_patterns import LayerNumbers, PathMatcher
from lora_ext.model.rows.invocations import InvocationLimits

_SUFFIXES = {".lora_A.weight": "lora_A", ".lora_B.weight": "lora_B"}


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """A layer of the pool, by its path in the model."""

    in_features: int
    out_features: int


@dataclasses.dataclass(frozen=True)
class PoolShape:
    """The parts of an adapter that a pool stores.

    Attributes:
        layers: layers with low-rank updates, by path.
        r: the largest rank.
        modules: modules that adapters train in full, by path: their tensors by name, for shapes and dtypes.
        invocations: the limits of the model for invocation tokens (aLoRA).
        head: the path of the model's output head, or None.
    """

    layers: Mapping[str, LayerShape]
    r: int
    modules: Mapping[str, Mapping[str, Tensor]]
    invocations: InvocationLimits
    head: str | None


@dataclasses.dataclass(frozen=True)
class LayerUpdate:
    """One layer's part of an adapter."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float

    @property
    def nbytes(self) -> int:
        return self.lora_A.nbytes + self.lora_B.nbytes


@dataclasses.dataclass(frozen=True)
class PoolAdapter:
    """An adapter of the pool.

    Attributes:
        updates: by layer path.
        modules: modules trained in full, by path: their tensors by name.
        invocation: the tokens from which on it acts (aLoRA), or None.
    """

    updates: Mapping[str, LayerUpdate]
    modules: Mapping[str, Mapping[str, Tensor]]
    invocation: tuple[int, ...] | None

    @property
    def nbytes(self) -> int:
        modules = sum(tensor.nbytes for tensors in self.modules.values() for tensor in tensors.values())
        return modules + sum(update.nbytes for update in self.updates.values())

    def copied(self, copy: Callable[[Tensor], Tensor]) -> PoolAdapter:
        """The same with tensors that ``copy`` returns."""
        updates = {path: LayerUpdate(copy(u.lora_A), copy(u.lora_B), u.scaling) for path, u in self.updates.items()}
        modules = {path: {name: copy(t) for name, t in tensors.items()} for path, tensors in self.modules.items()}
        return PoolAdapter(updates, modules, self.invocation)


def read_adapter(directory: Path, shape: PoolShape) -> PoolAdapter:
    """Reads the adapter in ``directory``.

    Raises:
        FileNotFoundError, OSError: a file is missing or cannot be read.
        ValueError: a file is corrupted, its config is not supported, or the adapter does not fit the pool: other
            layers, shapes, a larger rank, or parts that are no low-rank updates. The message lists what.
    """
    file = with_positive_alphas(AdapterFile.open(directory, caller="AdapterPool"), "AdapterPool")
    config = file.lora_config("AdapterPool")
    layers, r = shape.layers, shape.r
    modules = {path: names for path, names in shape.modules.items() if _is_in(file, path, names)}
    of_modules = {f"{KEY_PREFIX}{path}.{name}" for path, names in modules.items() for name in names}
    problems = _parts_of_other_kinds(config)
    if tokens := config.alora_invocation_tokens:
        problems += filter(None, [shape.invocations.problem(tokens)])
    if absent := [name for name in config.trained_modules if _is_absent(file, name, shape)]:
        problems.append(f"modules_to_save: the pool has no {absent}; make it with modules_to_save={absent}")
    keys: dict[str, dict[str, str]] = {}
    for key in file.keys():  # noqa: SIM118  not a dict
        suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
        path = "" if suffix is None else key.removeprefix(KEY_PREFIX).removesuffix(suffix)
        if path in layers:
            keys.setdefault(path, {})[_SUFFIXES[suffix]] = key
        elif key not in of_modules:
            problems.append(f"unexpected key: {key}{_remedy(key, shape)}")
    problems += _not_as_named(config, shape, {*keys, *modules})
    for path, factors in keys.items():
        problems += _misfits(file, path, factors, layers[path], config.rank_for(path), r)
    problems += _misfits_of_modules(file, modules)
    if not keys and not modules and not problems:
        problems.append("it has no factors")
    if problems:
        base = file.config.get("base_model_name_or_path")
        raise ValueError(
            f"AdapterPool: {file.path} does not fit the pool of rank {r} (its base model is {base!r}); load it with "
            f"load_adapter, or make a pool with its layers and rank:{listed(first_shape(problems))}"
        )
    named = {path: {name: f"{KEY_PREFIX}{path}.{name}" for name in names} for path, names in modules.items()}
    values = {key: tensor.clone() for key, tensor in file.tensors.items()}  # kept after the file may change
    file.warn_of_damage(key for held in (*keys.values(), *named.values()) for key in held.values())
    updates = {}
    for path, factors in keys.items():
        scaling = config.scaling_for(path)
        updates[path] = LayerUpdate(values[factors["lora_A"]], values[factors["lora_B"]], scaling)
    tensors = {path: {name: values[key] for name, key in held.items()} for path, held in named.items()}
    return PoolAdapter(updates, tensors, config.alora_invocation_tokens)


def _remedy(key: str, shape: PoolShape) -> str:
    """Returns what to do about an unexpected key, or "".

    PEFT saves the base layer of an adapted head, too. A layer in a module that adapters train in full has no slots.
    """
    path = key.removeprefix(KEY_PREFIX).rpartition(".")[0].removesuffix(".base_layer")
    if path in shape.layers:
        save = "load_adapter, then save_adapter(..., save_embedding_layers=False)"
        return f" (a base layer; if it is the base model's: {save})"
    inside = next((module for module in shape.modules if f"{path}.".startswith(f"{module}.")), None)
    return "" if inside is None or ".lora_" not in key else f" (the pool holds {inside} in full only: modules_to_save)"


def _not_as_named(config: LoraConfig, shape: PoolShape, found: Container[str]) -> list[str]:
    """Returns a problem for each part of the pool that ``config`` names and the file has not (it is not whole, or of a
    model with fewer layers), and for each one that the file has and ``config`` does not name.
    """
    trained = SuffixTable(config.trained_modules)
    saved = [path for path in shape.modules if path not in found and trained.find(path)]
    layers = [path for path in shape.layers if not any(map(trained.find, _prefixes(path)))]
    named = _named(config, shape, layers)
    return [
        *(f"missing key: {KEY_PREFIX}{path}.lora_A.weight" for path in layers if path in named and path not in found),
        *(f"missing keys of {KEY_PREFIX}{path}" for path in saved),
        *(
            f"unexpected key: {KEY_PREFIX}{path}.lora_A.weight, of a layer that the config does not name"
            for path in layers
            if path in found and path not in named
        ),
    ]


def _named(config: LoraConfig, shape: PoolShape, layers: list[str]) -> set[str]:
    """Returns those of the pool's ``layers`` that ``config`` targets."""
    others = names_next_to_all_linear(config)
    matches = PathMatcher("target_modules", config.target_modules if others is None else others)
    targets = [path for path in layers if matches(path) or (others is not None and path != shape.head)]
    is_excluded = PathMatcher("exclude_modules", config.exclude_modules)
    whole = () if isinstance(config.target_modules, str) else config.target_modules or ()
    numbers = LayerNumbers(config.layers_to_transform, config.layers_pattern, whole)
    return {path for path in targets if path in numbers and not is_excluded(path)}


def _prefixes(path: str) -> list[str]:
    return [path[: begin - 1] for begin in path_ends(path) if begin] + [path]


def _is_in(file: AdapterFile, path: str, names: Mapping[str, Tensor]) -> bool:
    """Returns whether the file has a tensor of the module at ``path``."""
    return any(f"{KEY_PREFIX}{path}.{name}" in file for name in names)


def _misfits_of_modules(file: AdapterFile, modules: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    problems = []
    for path, names in modules.items():
        for name, tensor in names.items():
            key = f"{KEY_PREFIX}{path}.{name}"
            if key not in file:
                problems.append(f"missing key: {key}")
            elif problem := _misfit(file, key, tuple(tensor.shape)):
                problems.append(problem)
            elif file.dtype(key).is_floating_point != tensor.is_floating_point() or file.dtype(key).is_complex:
                problems.append(f"dtype of {key}: {file.dtype(key)} in the file, {tensor.dtype} in the pool")
    return problems


def _is_absent(file: AdapterFile, name: str, shape: PoolShape) -> bool:
    """Returns whether the file has a module trained in full, by its name in the config, that the pool has not."""

    def is_named(path: str) -> bool:
        return f".{name}." in f".{path}."  # the module, or one inside it

    paths = {key.removeprefix(KEY_PREFIX).rpartition(".")[0] for key in file.keys()}  # noqa: SIM118  not a dict
    return any(map(is_named, paths)) and not any(map(is_named, shape.modules))


def _parts_of_other_kinds(config: LoraConfig) -> list[str]:
    return [
        f"{option}: a pool holds low-rank updates of linear layers, and modules trained in full"
        for option, unused in (
            ("trainable_token_indices", None),
            ("target_parameters", None),
            ("bias", "none"),
            ("lora_bias", False),
            ("use_dora", False),
        )
        if getattr(config, option) not in (unused, (), [], {})
    ]


def _misfit(file: AdapterFile, key: str, shape: tuple[int, ...]) -> str | None:
    found = file.shape(key)
    return None if found == shape else f"shape of {key}: {list(found)} in the file, {list(shape)} in the pool"


def _misfits(
    file: AdapterFile, path: str, factors: Mapping[str, str], layer: LayerShape, rank: int, r: int
) -> list[str]:
    if missing := [name for name in ("lora_A", "lora_B") if name not in factors]:
        return [f"missing key: {KEY_PREFIX}{path}.{missing[0]}.weight"]
    if rank > r:
        return [f"rank of {path}: {rank}, above the pool's {r}"]
    wanted = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
    problems = []
    for name, shape in wanted.items():
        key = factors[name]
        if problem := _misfit(file, key, shape):
            problems.append(problem)
        if not file.dtype(key).is_floating_point:
            problems.append(f"dtype of {key}: {file.dtype(key)}, want floating-point numbers")
    return problems
