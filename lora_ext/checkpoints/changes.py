"""Decides which tensors of a checkpoint adapters change, and how: from names, shapes and dtypes, before any is read."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch

from lora_ext._common.printable import listed, shown
from lora_ext._ops.checks import FLOATING
from lora_ext.checkpoints.checkpoint_files import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate, TokenRows
from lora_ext.checkpoints.layouts import (
    Evidence,
    Layout,
    assign_parameters,
    choose_layout,
    fitting_layouts,
    misfit,
    num_matrices,
)
from lora_ext.checkpoints.parameter_names import match_names
from lora_ext.checkpoints.ties import find_tie
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.safetensors_format import DTYPE_NAMES, DTYPES

_DEQUANTISE = "dequantise the base first, or load both and call merge_and_unload(model, dequantize=True)"
_MOST_PARAMETERS = 64  # with updates, in one module; real modules have up to 3


@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank update of one tensor. Without ``lora_A``, the update of a bias: the vector ``lora_B``.

    Attributes:
        lora_A, lora_B: keys in ``file``.
        matrices: see :func:`~lora_ext.checkpoints.layouts.num_matrices`.
        magnitude: key of the norms that the rows of the sum get (DoRA), or None.
    """

    file: AdapterFile
    lora_A: str | None
    lora_B: str
    scaling: float
    layout: Layout = "plain"
    matrices: int = 1
    is_parameter: bool = False
    magnitude: str | None = None


@dataclasses.dataclass
class TensorChange:
    """The steps that make one tensor of the result: copy or replace it, then replace rows, then add updates.

    Attributes:
        dtype: dtype of the source, by its name in the file format.
        source: key in the base; None if there is only the ``replacement``, a tensor of an adapter.
    """

    shape: tuple[int, ...]
    dtype: str
    source: str | None
    replacement: tuple[AdapterFile, str] | None = None
    rows: list[tuple[AdapterFile, str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    terms: list[Term] = dataclasses.field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        return bool(self.replacement or self.terms or self.rows)


@dataclasses.dataclass
class MergeChanges:
    """The tensors of the result by key: the base's first, in its order.

    Attributes:
        untied: tied tensors that are now stored apart: key -> key of the base's tensor that it is stored next to.
    """

    tensors: dict[str, TensorChange]
    untied: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        return [key for key, tensor in self.tensors.items() if tensor.is_changed]


def find_changes(
    base: Checkpoint,
    adapters: Sequence[AdapterContents],
    *,
    fan_in_fan_out: bool | None = None,
    untie: bool = False,
    multiplier: float = 1.0,
) -> MergeChanges:
    """Matches the contents of adapters with the tensors of ``base``.

    Args:
        fan_in_fan_out: layout of square weights that no other weight decides: True for ``[in, out]``, as in Conv1D.
        untie: store tied weights apart if an adapter changes only one of them.
        multiplier: multiplies every scaling.

    Raises:
        ValueError: parts of an adapter have no place in the base, or do not fit it; the message lists all of them.
    """
    changes = MergeChanges({key: TensorChange(base.info(key).shape, base.info(key).dtype, key) for key in base})
    problems: list[str] = []
    for contents in adapters:
        problems += _AdapterChanges(base, changes, contents, fan_in_fan_out, untie, multiplier).problems
    for key in changes.changed:
        tensor = changes.tensors[key]
        if (tensor.terms or tensor.rows) and not _is_floating(tensor):
            problems.append(_quantised(key, tensor))
        if tensor.replacement is not None and not _holds(tensor):
            problems.append(f"dtype of {key}: {tensor.dtype}, which the adapter's {_dtype(tensor.replacement)} is not")
        indices = list(itertools.chain.from_iterable(rows for _, _, rows in tensor.rows))
        if len(set(indices)) < len(indices):
            problems.append(f"rows of {key}: replaced more than once")
        if scaled := [term for term in tensor.terms if term.magnitude is not None]:
            problems += _dora_problems(key, tensor, scaled[0])
        if len({term.matrices for term in tensor.terms}) > 1:
            problems.append(f"{key}: the adapters disagree on how many matrices it holds")
    if problems:
        directories = ", ".join(str(contents.file.directory) for contents in adapters)
        raise ValueError(f"{directories} does not fit {base.directory}:{listed(list(dict.fromkeys(problems)))}")
    return changes


class _AdapterChanges:
    """Adds the changes of one adapter; ``problems`` lists what does not fit."""

    def __init__(
        self,
        base: Checkpoint,
        changes: MergeChanges,
        contents: AdapterContents,
        fan_in_fan_out: bool | None,
        untie: bool,
        multiplier: float,
    ) -> None:
        self.changes, self.file, self.multiplier = changes, contents.file, multiplier
        self.fan_in_fan_out, self.untie, self.tie = fan_in_fan_out, untie, find_tie(base)
        updates, replaced = contents.updates, contents.replaced
        if self.tie is not None and self.file.config.get("ensure_weight_tying"):
            # The file holds the shared weight twice.
            updates = [update for update in updates if _weight_name(update) != self.tie.head]
            replaced = {name: key for name, key in replaced.items() if name != self.tie.head}
            self.tie = None
        low_rank = [update for update in updates if update.kind != "parameter"]
        parameters = [update for update in updates if update.kind == "parameter"]
        biases = [update for update in updates if update.lora_bias is not None]
        needed = [*map(_weight_name, low_rank), *map(_bias_name, biases)]
        needed += [f"{rows.path}.weight" for rows in contents.tokens]
        optional = [f"{update.path}.{name}" for update in parameters for name in update.parameters]
        names = match_names(
            {*changes.tensors, *([self.tie.head] if self.tie else [])}, [*needed, *optional, *contents.replaced]
        )
        self.keys, self.problems = names.keys, list(names.problems)
        self.problems += [_missing(name, changes.tensors) for name in needed if name not in self.keys]
        self.problems += [
            f"not in the base: any of {', '.join(f'{update.path}.{name}' for name in update.parameters)}"
            for update in parameters
            if not any(f"{update.path}.{name}" in self.keys for name in update.parameters)
        ]
        self._add_whole_tensors(replaced, names.same_prefix)
        self._add_rows(contents.tokens)
        self._add_updates(low_rank, parameters)
        for update in biases:
            self._add_to_bias(update)

    def _add_whole_tensors(self, replaced: Mapping[str, str], same_prefix: bool) -> None:
        """Replaces tensors of the base, and adds those that it lacks if its names have the adapter's prefix."""
        for name, key in replaced.items():
            if name in self.keys:
                self._replace(self.keys[name], key)
            elif not same_prefix:
                self.problems.append(
                    f"not in the base, whose names have another prefix, so it cannot be added: {name}; load the base "
                    "and the adapter as a model (load_adapter), and call merge and save_pretrained there"
                )
            elif (dtype := DTYPE_NAMES.get(self.file.dtype(key))) is None:
                self.problems.append(f"dtype of {key}: {self.file.dtype(key)}, which a safetensors file cannot hold")
            else:
                self.changes.tensors[name] = TensorChange(self.file.shape(key), dtype, None, (self.file, key))

    def _add_rows(self, tokens: Sequence[TokenRows]) -> None:
        """Replaces rows of an embedding; in the tied head too, as PEFT does, unless the head has its own rows."""
        names = [f"{rows.path}.weight" for rows in tokens]
        head_has_rows = self.tie is not None and self.tie.head in map(self.keys.get, names)
        for rows, name in zip(tokens, names, strict=True):
            if name in self.keys and (not head_has_rows or self._is_own(self.keys[name])):
                self._replace_rows(self.keys[name], rows.key, rows.indices)

    def _add_updates(self, low_rank: Sequence[LowRankUpdate], parameters: Sequence[LowRankUpdate]) -> None:
        targets = {update: self.keys[name] for update in low_rank if (name := _weight_name(update)) in self.keys}
        by_path: dict[str, list[LowRankUpdate]] = {}
        for update in parameters:
            by_path.setdefault(update.path, []).append(update)
        for of_module in by_path.values():
            targets |= self._parameter_targets(of_module)
        self._add_to_weights(targets)

    def _replace(self, target: str, key: str) -> None:
        if not self._is_own(target):
            return
        tensor, shape = self.changes.tensors[target], self.file.shape(key)
        if tensor.shape != shape:
            self.problems.append(f"shape of {target}: {list(tensor.shape)} in the base, {list(shape)} in the adapter")
        elif tensor.replacement is not None and not _equal(tensor.replacement, (self.file, key)):
            self.problems.append(f"{target}: replaced by two adapters, which differ")
        else:
            tensor.replacement = (self.file, key)

    def _replace_rows(self, target: str, key: str, indices: tuple[int, ...]) -> None:
        tensor, shape = self.changes.tensors[target], self.file.shape(key)
        if not tensor.shape or shape != (len(indices), *tensor.shape[1:]):
            self.problems.append(
                f"shape of {target}: {list(tensor.shape)}, but {len(indices)} rows of it are {list(shape)}"
            )
        elif not all(type(index) is int and 0 <= index < tensor.shape[0] for index in indices):
            self.problems.append(
                f"trainable_token_indices: {shown(list(indices))}, want rows of {target} {list(tensor.shape)}"
            )
        else:
            tensor.rows.append((self.file, key, indices))

    def _parameter_targets(self, updates: list[LowRankUpdate]) -> dict[LowRankUpdate, str]:
        if len(updates) > _MOST_PARAMETERS:
            self.problems.append(f"{updates[0].path} has {len(updates)} updates, want at most {_MOST_PARAMETERS}")
            return {}
        names = [f"{updates[0].path}.{name}" for name in updates[0].parameters]
        shapes = {key: self.changes.tensors[key].shape for name in names if (key := self.keys.get(name)) is not None}
        possible = assign_parameters(self.file, updates, shapes)
        if len(possible) == 1:
            return possible[0]
        if possible:
            self.problems.append(
                f"shapes do not say which layer an update belongs to: {', '.join(shapes)}; merge in memory, with PEFT"
            )
        elif shapes:
            self.problems += [misfit(self.file, update, key, shapes[key]) for update in updates for key in shapes]
        return {}

    def _add_to_weights(self, targets: dict[LowRankUpdate, str]) -> None:
        targets = {update: key for update, key in targets.items() if self._is_own(key)}
        fitting = {
            update: fitting_layouts(self.file, update, self.changes.tensors[key].shape)
            for update, key in targets.items()
        }
        evidence, configured = Evidence(fitting), bool(self.file.config.get("fan_in_fan_out"))
        for update, key in targets.items():
            tensor = self.changes.tensors[key]
            if not fitting[update]:
                is_packed = not _is_floating(tensor)  # two codes in a byte have another shape
                wrong = _quantised(key, tensor) if is_packed else misfit(self.file, update, key, tensor.shape)
                self.problems.append(wrong)
                continue
            layout = choose_layout(update, fitting[update], evidence, asked=self.fan_in_fan_out, configured=configured)
            if layout is None:
                self.problems.append(f"{key} is square, and may be [out, in] or [in, out]: say which (fan_in_fan_out)")
                continue
            scaling = update.scaling * self.multiplier
            matrices, is_parameter = num_matrices(self.file, update), update.kind == "parameter"
            factors = update.lora_A, update.lora_B, scaling, layout, matrices, is_parameter
            tensor.terms.append(Term(self.file, *factors, update.magnitude))

    def _add_to_bias(self, update: LowRankUpdate) -> None:
        name = _bias_name(update)
        if name not in self.keys:
            return
        tensor, shape = self.changes.tensors[self.keys[name]], self.file.shape(update.lora_bias)
        if len(shape) != 1 or tensor.shape != shape:
            self.problems.append(f"shape of {name}: {list(tensor.shape)}, but {update.lora_bias} is {list(shape)}")
        else:
            tensor.terms.append(Term(self.file, None, update.lora_bias, update.scaling * self.multiplier))

    def _is_own(self, target: str) -> bool:
        """Returns whether ``target`` shares its values with no tensor. Unties it if asked to, else notes a problem."""
        if self.tie is None or target not in (self.tie.head, self.tie.embedding):
            return True
        if not self.untie:
            self.problems.append(
                f"{self.tie.embedding} and {self.tie.head} are tied, and the adapter changes {target} only: untie them "
                "(untie), so that both are stored"
            )
        elif self.tie.head not in self.changes.tensors:
            embedding = self.changes.tensors[self.tie.embedding]
            self.changes.tensors[self.tie.head] = TensorChange(embedding.shape, embedding.dtype, self.tie.embedding)
            self.changes.untied[self.tie.head] = self.tie.embedding
        return self.untie


def _dora_problems(key: str, tensor: TensorChange, term: Term) -> list[str]:
    remedy = "load it into the model (load_adapter), and call merge_and_unload and save_pretrained there"
    if term.layout != "plain":
        return [f"{key} is [in, out], and a DoRA adapter (use_dora) scales its columns; {remedy}"]
    if len(tensor.terms) > 1:
        return [f"{key}: {term.file.directory} is a DoRA adapter (use_dora), which is merged without others"]
    return []


def _is_floating(tensor: TensorChange) -> bool:
    return DTYPES.get(tensor.dtype) in FLOATING


def _quantised(key: str, tensor: TensorChange) -> str:
    return f"dtype of {key}: {tensor.dtype}, want F64, F32, BF16 or F16; {_DEQUANTISE}"


def _missing(name: str, base: Iterable[str]) -> str:
    """Says that the base lacks ``name``, and what it has in the place of a weight: the parts of a quantised one."""
    layer, _, last = name.rpartition(".")
    others = sorted(key for key in base if f".{key}".endswith(f".{layer}.{key.rpartition('.')[2]}"))
    parts = [key for key in others if last == "weight" and not key.endswith(".bias")]
    return f"not in the base: {name}" + (f"; it has {parts[0]}: {_DEQUANTISE}" if parts else "")


def _weight_name(update: LowRankUpdate) -> str:
    return f"{update.path}.{'in_proj_weight' if update.kind == 'attention' else 'weight'}"


def _bias_name(update: LowRankUpdate) -> str:
    return f"{update.path}.{'in_proj_bias' if update.kind == 'attention' else 'bias'}"


def _holds(tensor: TensorChange) -> bool:
    """Returns whether the base's dtype can hold the replacement. A quantised tensor cannot: it needs its scales."""
    stored, given = DTYPES.get(tensor.dtype), _dtype(tensor.replacement)
    return stored == given or (stored in FLOATING and given in FLOATING)


def _dtype(replacement: tuple[AdapterFile, str]) -> torch.dtype:
    file, key = replacement
    return file.dtype(key)


def _equal(first: tuple[AdapterFile, str], second: tuple[AdapterFile, str]) -> bool:
    (file, key), (other, other_key) = first, second
    return torch.equal(file.tensor(key), other.tensor(other_key))
