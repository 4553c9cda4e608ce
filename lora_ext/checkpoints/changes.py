"""Decides which tensors of a checkpoint adapters change, and how: from names, shapes and dtypes, before any is read."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._common.messages import listed
from lora_ext._ops.checks import FLOATING
from lora_ext.checkpoints.checkpoint import Checkpoint, find_tie
from lora_ext.files.contents import AdapterContents, LowRankUpdate

_DEQUANTISE = "want float64, float32, bfloat16 or float16: dequantise the base first (Transformers: model.dequantize())"
_IN_MEMORY = "load base and adapter as a model (load_adapter), and call merge_and_unload and save_pretrained there"

_MOST_CANDIDATES = 16  # prefixes that are tried; real checkpoints have one


class Term(NamedTuple):
    """One low-rank update of one tensor."""

    update: LowRankUpdate
    scaling: float  # the update's, times the adapter's weight
    transposed: bool  # the tensor is [in, out]

    def read(self) -> list[tuple[Tensor, Tensor, float]]:
        """Reads ``(lora_A, lora_B, scaling)`` for each matrix, in the layout of the tensor."""
        pairs = self.update.factors()
        return [(B.T, A.T, self.scaling) if self.transposed else (A, B, self.scaling) for A, B in pairs]


@dataclasses.dataclass
class TensorChange:
    """The steps that make one tensor of the result: copy or replace it, then add updates."""

    shape: tuple[int, ...]
    dtype: torch.dtype  # of the source
    source: str | None  # key in the base; None if there is only the replacement
    replacement: Tensor | None = None
    terms: list[Term] = dataclasses.field(default_factory=list)

    @property
    def is_floating(self) -> bool:
        """Whether updates can be added to the tensor."""
        return self.dtype in FLOATING

    def dtype_as(self, wanted: torch.dtype | None) -> torch.dtype:
        """The dtype of the result, if ``wanted`` is; indices and quantised weights keep theirs."""
        return wanted if wanted is not None and self.is_floating else self.dtype

    def equals(self, other: TensorChange) -> bool:
        """Returns whether both make the same tensor of the same source."""
        return not self.terms + other.terms and _are_equal(self.replacement, other.replacement)


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
    changes = {key: TensorChange(info.shape, info.dtype, key) for key, info in base.items()}
    tie = find_tie(base)
    if tie is not None:  # a tensor of its own, until it turns out to be equal
        changes[tie.head] = dataclasses.replace(changes[tie.embedding], terms=[])
    problems: list[str] = []
    for contents, weight in zip(adapters, weights or [1.0] * len(adapters), strict=True):
        problems += _AdapterChanges(changes, contents, fan_in_fan_out, weight).problems
    for key, tensor in changes.items():
        problems += _wrong_dtypes(key, tensor)
    if problems:
        directories = ", ".join(str(contents.file.directory) for contents in adapters)
        raise ValueError(f"{directories} does not fit {base.directory}:{listed(list(dict.fromkeys(problems)))}")
    if tie is not None and changes[tie.head].equals(changes[tie.embedding]):
        del changes[tie.head]
    return changes


class _AdapterChanges:
    """Adds the changes of one adapter; ``problems`` lists what does not fit."""

    def __init__(
        self, changes: dict[str, TensorChange], contents: AdapterContents, fan_in_fan_out: bool | None, weight: float
    ) -> None:
        self.changes, self.weight = changes, weight
        self.fan_in_fan_out, self.config = fan_in_fan_out, contents.file.config
        self.problems = [
            f"{contents.file.directory} was trained with {option}; {_IN_MEMORY}" for option in sorted(contents.options)
        ]
        if weight != 1.0 and contents.replaced:
            first = next(iter(contents.replaced))
            self.problems.append(f"weight {weight}: the adapter replaces tensors, which have no strength: {first}")
        sure = [update.names[0] for update in contents.updates if not update.parameters]
        possible = [name for update in contents.updates if update.parameters for name in update.names]
        self.prefix = find_prefix(changes, [*sure, *contents.replaced, *possible])
        for name, tensor in contents.replaced.items():
            self._replace(name, tensor)
        self._add(contents.updates)

    def _replace(self, name: str, given: Tensor) -> None:
        """Replaces a tensor of the base, or adds one that it lacks if its names have the adapter's prefix."""
        target = self.prefix.key(name)
        if target not in self.changes:
            if any(self.prefix):
                text = "not in the base, whose names have another prefix, so it cannot be added"
                self.problems.append(f"{text}: {name}; {_IN_MEMORY}")
            else:
                self.changes[name] = TensorChange(tuple(given.shape), given.dtype, None, given)
            return
        tensor = self.changes[target]
        if tensor.shape != given.shape:
            shapes = f"{list(tensor.shape)} in the base, {list(given.shape)} in the adapter"
            self.problems.append(f"shape of {target}: {shapes}")
        elif tensor.replacement is not None and not _are_equal(tensor.replacement, given):
            self.problems.append(f"{target}: replaced by two adapters, which differ")
        tensor.replacement = given

    def _add(self, updates: Sequence[LowRankUpdate]) -> None:
        """Adds each update to the tensor of its name, in the layout that fits.

        A square weight has the layout of others of its name, or of its kind; then ``fan_in_fan_out`` of the adapter's
        config counts for linear layers, though PEFT writes the value of the layer that it met last.
        """
        places: dict[str, tuple[LowRankUpdate, set[bool]]] = {}
        certain: dict[str, set[bool]] = defaultdict(set)  # name or kind -> layouts of updates that fit only one
        for update in updates:
            if (key := self._place(update, places)) is not None:
                layouts = update.layouts(self.changes[key].shape)
                places[key] = update, layouts
                if len(layouts) == 1:
                    certain[_last_name(update)] |= layouts
                    certain[update.kind] |= layouts
        for key, (update, layouts) in places.items():
            if len(layouts) > 1 and self.fan_in_fan_out is not None:
                layouts = {self.fan_in_fan_out}
            elif len(layouts) > 1:
                unknown = layouts if update.kind == "parameter" else {bool(self.config.get("fan_in_fan_out"))}
                layouts = certain[_last_name(update)] or certain[update.kind] or unknown
            if len(layouts) > 1:
                self.problems.append(f"{key} is square, and may be [out, in] or [in, out]: say which (fan_in_fan_out)")
            else:
                self.changes[key].terms.append(Term(update, update.scaling * self.weight, *layouts))

    def _place(self, update: LowRankUpdate, taken: Collection[str]) -> str | None:
        """The key of the only tensor that the update fits: keys of parameters do not say. None: a problem is noted."""
        keys = [key for name in update.names if (key := self.prefix.key(name)) in self.changes]
        fitting = [key for key in keys if update.layouts(self.changes[key].shape)]
        if len(fitting) == 1 and fitting[0] not in taken:
            return fitting[0]
        if fitting:
            text = f"shapes do not say which layer an update belongs to: {', '.join(keys)}"
            self.problems.append(f"{text}; merge in memory, with PEFT")
        elif keys:
            self.problems += [_misfit(update, key, self.changes[key]) for key in keys]
        elif update.parameters:
            self.problems.append(f"not in the base: any of {', '.join(update.names)}")
        else:  # the parts of a quantised weight, or several projections, may stand in its place
            others = (key for key in self.changes if f".{key.rpartition('.')[0]}".endswith(f".{update.path}"))
            parts = sorted(key for key in others if not key.endswith("bias"))
            text = f"; it has {parts[0]}, {_DEQUANTISE}" if parts else ""
            self.problems.append(f"not in the base: {update.names[0]}{text}")
        return None


def _last_name(update: LowRankUpdate) -> str:
    return f"{update.kind} {update.path.rpartition('.')[2]}"


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def _wrong_dtypes(key: str, tensor: TensorChange) -> list[str]:
    if tensor.terms and not tensor.is_floating:
        return [f"dtype of {key}: {tensor.dtype}, {_DEQUANTISE}"]
    if tensor.replacement is not None:
        given = tensor.replacement.dtype
        if tensor.dtype != given and not (tensor.is_floating and given in FLOATING):  # quantised numbers need scales
            return [f"dtype of {key}: {tensor.dtype}, which the adapter's {given} is not"]
    return []


def _misfit(update: LowRankUpdate, key: str, tensor: TensorChange) -> str:
    if not tensor.is_floating:  # two codes in a byte have another shape
        return f"dtype of {key}: {tensor.dtype}, {_DEQUANTISE}"
    A, B = list(update.lora_A.shape), list(update.lora_B.shape)
    return f"shape of {key}: {list(tensor.shape)}, but the update's lora_A is {A} and lora_B {B}"


# --- names ------------------------------------------------------------------------------------------------------------


class Prefix(NamedTuple):
    """Turns names of an adapter into those of a checkpoint: takes one prefix away and adds another.

    An adapter of ``BertForSequenceClassification`` calls ``bert.encoder...`` what a checkpoint of ``BertModel`` calls
    ``encoder...``, and the other way round.
    """

    removed: str = ""
    added: str = ""

    def key(self, name: str) -> str | None:
        """The name in the checkpoint; None if it has none."""
        return self.added + name.removeprefix(self.removed) if name.startswith(self.removed) else None


def find_prefix(keys: Collection[str], names: Sequence[str]) -> Prefix:
    """Finds the prefix with which most of ``names`` are ``keys``, if none is as it is. ValueError: two fit equally."""
    if not names or any(name in keys for name in names):
        return Prefix()
    name = names[0]
    ends = [place + 1 for place, letter in enumerate(name) if letter == "."][:-1]  # a lone "weight" says nothing
    candidates = [Prefix(removed=name[:end]) for end in ends if name[end:] in keys][:1]
    candidates += [Prefix(added=key.removesuffix(name)) for key in keys if key.endswith(f".{name}")]
    best = candidates
    if 1 < len(candidates) <= _MOST_CANDIDATES:
        fits = {prefix: sum(prefix.key(one) in keys for one in names) for prefix in candidates}
        best = [prefix for prefix, count in fits.items() if count == max(fits.values())]
    if len(best) > 1:
        raise ValueError(f"{name} may be any of {', '.join(sorted(str(one.key(name)) for one in best)[:5])}")
    return best[0] if best else Prefix()
