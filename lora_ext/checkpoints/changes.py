"""Decides which tensors of a checkpoint adapters change, and how: from names, shapes and dtypes, before any is read."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lora_ext._common.printable import listed, shown
from lora_ext._ops.checks import FLOATING
from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.checkpoints.contents import AdapterContents, LowRankUpdate, TokenRows
from lora_ext.checkpoints.names import find_prefix, find_tie
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.files.reading import DTYPE_NAMES, DTYPES

_DEQUANTISE = (
    "want F64, F32, BF16 or F16: dequantise the base first, or load both and call "
    "merge_and_unload(model, dequantize=True)"
)
_IN_MEMORY = "load base and adapter as a model (load_adapter), and call merge_and_unload and save_pretrained there"


@dataclasses.dataclass(frozen=True)
class Term:
    """One low-rank update of one tensor, or the update of a bias."""

    file: AdapterFile
    update: LowRankUpdate
    scaling: float  # the update's, times the adapter's weight
    transposed: bool = False  # the tensor is [in, out]
    is_bias: bool = False  # the tensor is the bias, and its update lora_bias

    @property
    def magnitude(self) -> str | None:
        """Key of the norms that the rows of the tensor get."""
        return None if self.is_bias else self.update.magnitude

    def read(self) -> list[tuple[Tensor, Tensor, float]]:
        """Reads ``(lora_A, lora_B, scaling)`` for each matrix, in the layout of the tensor."""
        if self.is_bias:
            bias = self.file.tensors[self.update.lora_bias]
            return [(bias[None], torch.ones(1, 1, dtype=bias.dtype), self.scaling)]
        pairs = self.update.split(self.file.tensors[self.update.lora_A], self.file.tensors[self.update.lora_B])
        return [(B.T, A.T, self.scaling) if self.transposed else (A, B, self.scaling) for A, B in pairs]


@dataclasses.dataclass
class TensorChange:
    """The steps that make one tensor of the result: copy or replace it, then replace rows, then add updates."""

    shape: tuple[int, ...]
    dtype: str  # of the source, by its name in the file format
    source: str | None  # key in the base; None if there is only the replacement
    replacement: tuple[AdapterFile, str] | None = None  # a tensor of an adapter
    rows: list[tuple[AdapterFile, str, tuple[int, ...]]] = dataclasses.field(default_factory=list)
    terms: list[Term] = dataclasses.field(default_factory=list)

    @property
    def is_floating(self) -> bool:
        """Whether updates can be added to the tensor."""
        return DTYPES.get(self.dtype) in FLOATING


def find_changes(
    base: Checkpoint,
    adapters: Sequence[AdapterContents],
    *,
    fan_in_fan_out: bool | None = None,
    weights: Sequence[float] | None = None,
) -> dict[str, TensorChange]:
    """Matches the contents of adapters with the tensors of ``base``.

    A tied head is stored apart if an adapter changes only the head or only the embedding.

    Args:
        fan_in_fan_out: layout of square weights that no other weight decides: True for ``[in, out]``, as in Conv1D.
        weights: factor of each adapter's updates.

    Returns:
        The tensors of the result by key: the base's first, in its order.

    Raises:
        ValueError: parts of an adapter have no place in the base, or do not fit it; the message lists all of them.
    """
    changes = {key: TensorChange(base.info(key).shape, base.info(key).dtype, key) for key in base}
    problems: list[str] = []
    for contents, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        problems += _AdapterChanges(base, changes, contents, fan_in_fan_out, weight).problems
    for key, tensor in changes.items():
        problems += _misfits(key, tensor)
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
        updates, replaced, tokens = contents.updates, contents.replaced, contents.tokens
        is_apart = self.tie is not None and self.tie.head in changes  # an adapter before this one changed one of them
        if self.tie is not None and not is_apart and self._replaces_both_alike(replaced):
            replaced = {name: key for name, key in replaced.items() if name != self.tie.head}
            self.tie = None
        low_rank = {update: f"{update.prefix}weight" for update in updates if update.kind != "parameter"}
        parameters = [update for update in updates if update.kind == "parameter"]
        whole = [f"{rows.path}.weight" for rows in tokens] + [*replaced]
        if weight != 1.0 and whole:
            self.problems.append(f"weight {weight}: the adapter replaces tensors, which have no strength: {whole[0]}")
        names = [*low_rank.values(), *whole]
        names += [f"{update.path}.{name}" for update in parameters for name in update.parameters]
        self.prefix = find_prefix({*changes, *(self.tie or ())}, names)
        for name, key in replaced.items():
            self._replace(name, key)
        self._replace_rows(tokens)
        self._add_to_weights(low_rank | self._parameter_names(parameters))
        for update in updates:
            if update.lora_bias is not None:
                self._add_to_bias(update)

    def _replaces_both_alike(self, replaced: Mapping[str, str]) -> bool:
        """Returns whether the file holds a new weight for a tied head and its embedding, twice the same."""
        if not {*self.tie} <= replaced.keys():
            return False
        head, embedding = (self.file.tensors[replaced[key]] for key in (self.tie.head, self.tie.embedding))
        return torch.equal(head, embedding)

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
        # The parts of a quantised weight may stand in its place.
        layer, _, last = name.rpartition(".")
        parts = sorted(other for other in self.changes if f".{other.rpartition('.')[0]}".endswith(f".{layer}"))
        parts = [other for other in parts if last == "weight" and not other.endswith(".bias")]
        self.problems.append(f"not in the base: {name}" + (f"; it has {parts[0]}, {_DEQUANTISE}" if parts else ""))
        return None

    def _replace(self, name: str, key: str) -> None:
        """Replaces a tensor of the base, or adds one that it lacks if its names have the adapter's prefix."""
        given = self.file.tensors[key]
        shape, dtype = tuple(given.shape), DTYPE_NAMES[given.dtype]
        if self.prefix.key(name) not in {*self.changes, *(self.tie or ())}:
            if any(self.prefix):
                text = "not in the base, whose names have another prefix, so it cannot be added"
                self.problems.append(f"{text}: {name}; {_IN_MEMORY}")
            else:
                self.changes[name] = TensorChange(shape, dtype, None, (self.file, key))
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
        tensor, shape = self.changes[target], tuple(self.file.tensors[rows.key].shape)
        if not tensor.shape or shape != (len(rows.indices), *tensor.shape[1:]):
            text = f"{list(tensor.shape)}, but {len(rows.indices)} rows of it are {list(shape)}"
            self.problems.append(f"shape of {target}: {text}")
        elif not all(type(index) is int and 0 <= index < tensor.shape[0] for index in rows.indices):
            text = f"{shown(list(rows.indices))}, want rows of {target} {list(tensor.shape)}"
            self.problems.append(f"trainable_token_indices: {text}")
        else:
            tensor.rows.append((self.file, rows.key, rows.indices))

    def _parameter_names(self, updates: Iterable[LowRankUpdate]) -> dict[LowRankUpdate, str]:
        """Finds the parameter of each update by its shape, because keys do not say. It must be the only one to fit."""
        found: dict[LowRankUpdate, str] = {}
        taken: set[str] = set()
        for update in updates:
            names = [f"{update.path}.{name}" for name in update.parameters]
            tensors = {name: self.changes[key] for name in names if (key := self.prefix.key(name)) in self.changes}
            fitting = [name for name, tensor in tensors.items() if update.layouts(tensor.shape)]
            if len(fitting) == 1 and fitting[0] not in taken:
                found[update] = fitting[0]
                taken.add(fitting[0])
            elif fitting:
                text = f"shapes do not say which layer an update belongs to: {', '.join(tensors)}"
                self.problems.append(f"{text}; merge in memory, with PEFT")
            elif not tensors:
                self.problems.append(f"not in the base: any of {', '.join(names)}")
            else:
                self.problems += [_misfit(update, name, tensor) for name, tensor in tensors.items()]
        return found

    def _add_to_weights(self, names: Mapping[LowRankUpdate, str]) -> None:
        targets = {update: key for update, name in names.items() if (key := self._find(name)) is not None}
        fitting = {update: update.layouts(self.changes[key].shape) for update, key in targets.items()}
        certain: dict[str, set[bool]] = defaultdict(set)  # name or kind -> layouts of updates that fit only one
        for update, layouts in fitting.items():
            if len(layouts) == 1:
                certain[_last_name(update)] |= layouts
                certain[update.kind] |= layouts
        for update, key in targets.items():
            layouts = fitting[update] if len(fitting[update]) < 2 else self._layouts_of_square(update, certain)
            if not layouts:
                self.problems.append(_misfit(update, key, self.changes[key]))
            elif len(layouts) > 1:
                self.problems.append(f"{key} is square, and may be [out, in] or [in, out]: say which (fan_in_fan_out)")
            else:
                term = Term(self.file, update, update.scaling * self.weight, next(iter(layouts)))
                self.changes[key].terms.append(term)

    def _layouts_of_square(self, update: LowRankUpdate, certain: Mapping[str, set[bool]]) -> set[bool]:
        """The layouts that a square weight may have: the user's choice, or that of others of its name or kind.

        ``fan_in_fan_out`` of the adapter's config is a last resort: PEFT writes the value of the layer that it met
        last.
        """
        if self.fan_in_fan_out is not None:
            return {self.fan_in_fan_out}
        by_name = certain.get(_last_name(update), ())
        if len(by_name) == 1:
            return by_name
        unknown = {False, True} if update.kind == "parameter" else {bool(self.file.config.get("fan_in_fan_out"))}
        return certain.get(update.kind, unknown)

    def _add_to_bias(self, update: LowRankUpdate) -> None:
        if (target := self._find(f"{update.prefix}bias")) is None:
            return
        tensor, shape = self.changes[target], tuple(self.file.tensors[update.lora_bias].shape)
        if len(shape) != 1 or tensor.shape != shape:
            self.problems.append(f"shape of {target}: {list(tensor.shape)}, but {update.lora_bias} is {list(shape)}")
        else:
            tensor.terms.append(Term(self.file, update, update.scaling * self.weight, is_bias=True))


def _last_name(update: LowRankUpdate) -> str:
    return f"{update.kind} {update.path.rpartition('.')[2]}"


def _misfits(key: str, tensor: TensorChange) -> list[str]:
    """Says what is wrong with the changes of all adapters together."""
    problems: list[str] = []
    if (tensor.terms or tensor.rows) and not tensor.is_floating:
        problems.append(f"dtype of {key}: {tensor.dtype}, {_DEQUANTISE}")
    if tensor.replacement is not None:
        file, name = tensor.replacement
        stored, given = DTYPES.get(tensor.dtype), file.tensors[name].dtype
        if stored != given and not (tensor.is_floating and given in FLOATING):  # quantised numbers need their scales
            problems.append(f"dtype of {key}: {tensor.dtype}, which the adapter's {given} is not")
    indices = [index for _, _, rows in tensor.rows for index in rows]
    if len(set(indices)) < len(indices):
        problems.append(f"rows of {key}: replaced more than once")
    for term in tensor.terms:
        if term.magnitude is None:
            continue
        name = f"{term.file.directory} is a DoRA adapter (use_dora)"
        if term.transposed:
            problems.append(f"{key} is [in, out], and a DoRA adapter (use_dora) scales its columns; {_IN_MEMORY}")
        elif len(tensor.terms) > 1:
            problems.append(f"{key}: {name}, which is merged without others")
        elif term.scaling != term.update.scaling:
            problems.append(f"{key}: {name}, which is merged without a weight")
    return problems


def _misfit(update: LowRankUpdate, key: str, tensor: TensorChange) -> str:
    if not tensor.is_floating:  # two codes in a byte have another shape
        return f"dtype of {key}: {tensor.dtype}, {_DEQUANTISE}"
    A, B, shape = update.shape_A, update.shape_B, tensor.shape
    text = f"shape of {key}: {list(shape)}, but the update's lora_A is {list(A)} and lora_B {list(B)}"
    if update.kind == "conv" and update.matrices > 1 and len(shape) > 1 and A[1] == shape[1] * update.matrices:
        text += "; it reaches across the groups of the convolution, which no weight of it can hold"
    return text
