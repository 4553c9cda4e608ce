"""Decides which tensors of a checkpoint adapters change, and how: from names, shapes and dtypes, before any is read."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._ops.checks import FLOATING
from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate, TokenRows
from lora_ext.checkpoints.names import find_prefix, find_tie
from lora_ext.files.adapter_file import AdapterFile

_DEQUANTISE = "want float64, float32, bfloat16 or float16: dequantise the base first (Transformers: model.dequantize())"
_IN_MEMORY = "load base and adapter as a model (load_adapter), and call merge_and_unload and save_pretrained there"


@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank update of one tensor."""

    file: AdapterFile
    update: LowRankUpdate
    scaling: float  # the update's, times the adapter's weight
    transposed: bool  # the tensor is [in, out]

    def read(self) -> list[tuple[Tensor, Tensor, float]]:
        """Reads ``(lora_A, lora_B, scaling)`` for each matrix, in the layout of the tensor."""
        pairs = self.update.split(self.file.tensors[self.update.lora_A], self.file.tensors[self.update.lora_B])
        return [(B.T, A.T, self.scaling) if self.transposed else (A, B, self.scaling) for A, B in pairs]


@dataclasses.dataclass
class TensorChange:
    """The steps that make one tensor of the result: copy or replace it, then replace rows, then add updates."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # of the source
    source: str | None  # key in the base; None if there is only the replacement
    replacement: tuple[AdapterFile, str] | None = None  # a tensor of an adapter
    rows: list[tuple[Tensor, Tensor]] = dataclasses.field(default_factory=list)  # indices [n] and values [n, columns]
    terms: list[Term] = dataclasses.field(default_factory=list)

    @property
    def is_floating(self) -> bool:
        """Whether updates can be added to the tensor."""
        return self.dtype in FLOATING

    def dtype_as(self, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype of the result, if ``wanted`` is; indices and quantised weights keep theirs."""
        return wanted if wanted is not None and self.is_floating else self.dtype


def find_changes(
    base: Checkpoint,
    adapters: Sequence[AdapterContents],
    *,
    fan_in_fan_out: bool | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, TensorChange]:
    """Matches adapters with the tensors of ``base``; returns the tensors of the result, the base's first, in its order.

    A tied head is stored apart if an adapter changes only the head or only the embedding. ``fan_in_fan_out`` and
    ``weights`` are those of :func:`~lora_ext.checkpoints.merge`.

    ValueError: parts of an adapter have no place in the base, or do not fit it; the message lists all of them.
    """
    changes = {key: TensorChange(base.info(key).shape, base.info(key).dtype, key) for key in base}
    problems: list[str] = []
    for contents, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        problems += _AdapterChanges(base, changes, contents, fan_in_fan_out, weight).problems
    for key, tensor in changes.items():
        problems += _wrong_dtypes(key, tensor)
    if problems:
        directories = ", ".join(str(contents.file.directory) for contents in adapters)
        raise ValueError(f"{directories} does not fit {base.directory}:{listed(list(dict.fromkeys(problems)))}")
    return changes


class _AdapterChanges:
    """Adds the changes of one adapter; ``problems`` lists what does not fit."""

    def __init__(
        self,
        base: Checkpoint,
        changes: dict[str, TensorChange],
        contents: AdapterContents,
        fan_in_fan_out: bool | None,
        weight: float,
    ) -> None:
        self.changes, self.file, self.weight = changes, contents.file, weight
        self.fan_in_fan_out, self.tie = fan_in_fan_out, find_tie(base)
        self.problems: list[str] = []
        updates, replaced, tokens = contents.updates, dict(contents.replaced), contents.tokens
        if self.tie is not None and self.tie.head not in changes and self._are_equal(replaced):
            del replaced[self.tie.head]
            self.tie = None
        low_rank = {update: f"{update.path}.weight" for update in updates if update.kind != "parameter"}
        parameters = [update for update in updates if update.kind == "parameter"]
        whole = [f"{rows.path}.weight" for rows in tokens] + [*replaced]
        if weight != 1.0 and whole:
            self.problems.append(f"weight {weight}: the adapter replaces tensors, which have no strength: {whole[0]}")
        for option in ("use_dora", "lora_bias"):
            if self.file.config.get(option) or any(option in update.others for update in updates):
                self.problems.append(f"{self.file.directory} was trained with {option}; {_IN_MEMORY}")
        names = [*low_rank.values(), *whole]
        names += [f"{update.path}.{name}" for update in parameters for name in update.parameters]
        self.prefix = find_prefix({*changes, *(self.tie or ())}, names)
        for name, key in replaced.items():
            self._replace(name, key)
        self._replace_rows(tokens)
        self._add(low_rank | self._parameter_names(parameters))

    def _are_equal(self, replaced: Mapping[str, str]) -> bool:
        """Returns whether the adapter replaces an embedding and its tied head by one value, so that both stay tied."""
        both = [self.file.tensors[replaced[name]] for name in self.tie if name in replaced]
        return len(both) == 2 and torch.equal(*both)

    def _find(self, name: str) -> str | None:
        """The key of a tensor of the base, which a problem is noted for if it is missing.

        A tied head is stored apart if it or its embedding is asked for.
        """
        key = self.prefix.key(name)
        if self.tie is not None and key in self.tie and self.tie.head not in self.changes:
            tied = self.changes[self.tie.embedding]
            self.changes[self.tie.head] = dataclasses.replace(tied, rows=[*tied.rows], terms=[*tied.terms])
        if key in self.changes:
            return key
        # The parts of a quantised weight, or several projections, may stand in its place.
        layer, _, last = name.rpartition(".")
        parts = sorted(other for other in self.changes if f".{other.rpartition('.')[0]}".endswith(f".{layer}"))
        parts = [other for other in parts if last == "weight" and not other.endswith("bias")]
        self.problems.append(f"not in the base: {name}" + (f"; it has {parts[0]}, {_DEQUANTISE}" if parts else ""))
        return None

    def _replace(self, name: str, key: str) -> None:
        """Replaces a tensor of the base, or adds one that it lacks if its names have the adapter's prefix."""
        given = self.file.tensors[key]
        shape = tuple(given.shape)
        if self.prefix.key(name) not in {*self.changes, *(self.tie or ())}:
            if any(self.prefix):
                text = "not in the base, whose names have another prefix, so it cannot be added"
                self.problems.append(f"{text}: {name}; {_IN_MEMORY}")
            else:
                self.changes[name] = TensorChange(shape, given.dtype, None, (self.file, key))
            return
        target = self._find(name)
        tensor = self.changes[target]
        if tensor.shape != shape:
            self.problems.append(f"shape of {target}: {list(tensor.shape)} in the base, {list(shape)} in the adapter")
            return
        if tensor.replacement is not None:
            other, other_key = tensor.replacement
            if not torch.equal(other.tensors[other_key], given):
                self.problems.append(f"{target}: replaced by two adapters, which differ")
        tensor.replacement = (self.file, key)

    def _replace_rows(self, tokens: Sequence[TokenRows]) -> None:
        """Replaces rows of an embedding; in the tied head too, as PEFT does, unless the head has its own rows."""
        tie = self.tie
        follows = tie is not None and tie.head not in (self.prefix.key(f"{rows.path}.weight") for rows in tokens)
        self.tie = None if follows else tie
        for rows in tokens:
            if (target := self._find(f"{rows.path}.weight")) is None:
                continue
            is_both = follows and target == tie.embedding and tie.head in self.changes
            for key in tie if is_both else [target]:
                self._replace_rows_of(key, rows)
        self.tie = tie

    def _replace_rows_of(self, target: str, rows: TokenRows) -> None:
        tensor, values = self.changes[target], self.file.tensors[rows.key]
        shape, indices = tensor.shape, rows.indices
        if len(shape) != 2 or tuple(values.shape) != (len(indices), shape[1]):
            text = f"{list(shape)}, but {len(indices)} rows of it are {list(values.shape)}"
            self.problems.append(f"shape of {target}: {text}")
        elif not all(type(index) is int and 0 <= index < shape[0] for index in indices):
            text = f"{shown(list(indices))}, want rows of {target} {list(shape)}"
            self.problems.append(f"trainable_token_indices: {text}")
        else:
            tensor.rows.append((torch.tensor(indices, dtype=torch.long), values))
            replaced = torch.cat([one for one, _ in tensor.rows])
            if len(replaced.unique()) < len(replaced):
                self.problems.append(f"rows of {target}: replaced more than once")

    def _parameter_names(self, updates: Sequence[LowRankUpdate]) -> dict[LowRankUpdate, str]:
        """Finds the parameter of each update by its shape, because keys do not say. It must be the only one to fit."""
        found: dict[LowRankUpdate, str] = {}
        for update in updates:
            names = [f"{update.path}.{name}" for name in update.parameters]
            tensors = {name: self.changes[key] for name in names if (key := self.prefix.key(name)) in self.changes}
            fitting = [name for name, tensor in tensors.items() if update.layouts(tensor.shape)]
            if len(fitting) == 1 and fitting[0] not in found.values():
                found[update] = fitting[0]
            elif fitting:
                text = f"shapes do not say which layer an update belongs to: {', '.join(tensors)}"
                self.problems.append(f"{text}; merge in memory, with PEFT")
            elif not tensors:
                self.problems.append(f"not in the base: any of {', '.join(names)}")
            else:
                self.problems += [_misfit(update, name, tensor) for name, tensor in tensors.items()]
        return found

    def _add(self, names: Mapping[LowRankUpdate, str]) -> None:
        """Adds each update to the tensor of its name, in the layout that fits.

        A square weight has the layout of others of its name, or of its kind; then ``fan_in_fan_out`` of the adapter's
        config counts for linear layers, though PEFT writes the value of the layer that it met last.
        """
        targets = {update: key for update, name in names.items() if (key := self._find(name)) is not None}
        fitting = {update: update.layouts(self.changes[key].shape) for update, key in targets.items()}
        certain: dict[str, set[bool]] = defaultdict(set)  # name or kind -> layouts of updates that fit only one
        for update, layouts in fitting.items():
            if len(layouts) == 1:
                certain[_last_name(update)] |= layouts
                certain[update.kind] |= layouts
        for update, key in targets.items():
            layouts = fitting[update]
            if not layouts:
                self.problems.append(_misfit(update, key, self.changes[key]))
                continue
            if len(layouts) > 1 and self.fan_in_fan_out is not None:
                layouts = {self.fan_in_fan_out}
            elif len(layouts) > 1:
                unknown = layouts if update.kind == "parameter" else {bool(self.file.config.get("fan_in_fan_out"))}
                layouts = certain.get(_last_name(update)) or certain.get(update.kind) or unknown
            if len(layouts) > 1:
                self.problems.append(f"{key} is square, and may be [out, in] or [in, out]: say which (fan_in_fan_out)")
                continue
            term = Term(self.file, update, update.scaling * self.weight, *layouts)
            self.changes[key].terms.append(term)


def _last_name(update: LowRankUpdate) -> str:
    return f"{update.kind} {update.path.rpartition('.')[2]}"


def _wrong_dtypes(key: str, tensor: TensorChange) -> list[str]:
    if (tensor.terms or tensor.rows) and not tensor.is_floating:
        return [f"dtype of {key}: {tensor.dtype}, {_DEQUANTISE}"]
    if tensor.replacement is not None:
        file, name = tensor.replacement
        given = file.tensors[name].dtype
        if tensor.dtype != given and not (tensor.is_floating and given in FLOATING):  # quantised numbers need scales
            return [f"dtype of {key}: {tensor.dtype}, which the adapter's {given} is not"]
    return []


def _misfit(update: LowRankUpdate, key: str, tensor: TensorChange) -> str:
    if not tensor.is_floating:  # two codes in a byte have another shape
        return f"dtype of {key}: {tensor.dtype}, {_DEQUANTISE}"
    A, B, shape = update.shape_A, update.shape_B, tensor.shape
    text = f"shape of {key}: {list(shape)}, but the update's lora_A is {list(A)} and lora_B {list(B)}"
    if update.kind == "conv" and update.matrices > 1:
        text += "; it reaches across the groups of the convolution, which no weight of it can hold"
    return text
