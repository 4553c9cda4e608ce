"""``lora-ext extract``: makes an adapter that approximates the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.printable import first_of, listed
from lora_ext._common.progress import Progress
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext._ops.checks import FLOATING, accumulation_dtype
from lora_ext.checkpoints.checkpoint import Checkpoint
from lora_ext.checkpoints.low_rank import approximate
from lora_ext.checkpoints.names import find_tie, is_embedding
from lora_ext.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from lora_ext.files.reading import DTYPE_NAMES
from lora_ext.files.writing import check_new, new_directory, stream_tensors
from lora_ext.matching.path_names import name_covers


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The approximation of one layer.

    Attributes:
        r: rank of its factors.
        norm: Frobenius norm of the layer's difference.
        errors: rank -> norm of the remainder over ``norm``.
    """

    r: int
    norm: float
    errors: dict[int, float]


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """The result of an extraction.

    Attributes:
        layers: path -> approximation of each layer that differs and is adapted.
        errors: rank -> relative error of all these layers together; a layer of lower rank counts with its best.
        saved: modules that differ and are saved in full.
        unchanged: number of equal tensors.
        nbytes: bytes of the adapter's weights.
    """

    layers: dict[str, LayerError]
    errors: dict[int, float]
    saved: list[str]
    unchanged: int
    nbytes: int
    seconds: float


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 16,
    energy: float | None = None,
    target_modules: Sequence[str] | None = None,
    save_others: bool = True,
    fan_in_fan_out: bool = False,
    dtype: torch.dtype = torch.float32,
    show_progress: bool = False,
) -> ExtractReport:
    """Writes an adapter in PEFT's format to ``out`` that turns ``base`` into ``tuned``, up to the error in the report.

    Each matrix that differs is approximated by a truncated singular value decomposition of its difference
    (:func:`~lora_ext.checkpoints.low_rank.approximate`); the scaling is 1. One tensor of each checkpoint is in memory
    at a time, next to the adapter. Biases of adapted layers are saved in full (``bias="lora_only"``), and so are other
    modules that differ (``modules_to_save``). A head that shares the weight of a saved embedding follows it
    (``ensure_weight_tying``).

    Args:
        rank: largest rank of a layer.
        energy: in (0, 1]: each layer gets the smallest rank that keeps this part of its difference's squared norm.
        target_modules: names of layers, each a whole path or its end after a dot; None for all layers with a matrix
            ``weight`` except embeddings.
        save_others: save other modules that differ; if False, they are an error.
        fan_in_fan_out: matrices are ``[in, out]``, as in Conv1D (GPT-2).
        dtype: dtype of the factors.

    Raises:
        ValueError: nothing differs; tensors are in only one checkpoint, differ in shape, or differ and cannot be saved
            with an adapter (the message lists all of them); a name covers no matrix, or another argument is wrong.
        FileNotFoundError, FileExistsError, OSError: as :func:`~lora_ext.checkpoints.merge`.
    """
    begin = time.perf_counter()
    if rank < 1:
        raise ValueError(f"extract: rank is {rank}, want at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"extract: energy is {energy}, want 0 < energy <= 1")
    old, new, out = Checkpoint.open(base), Checkpoint.open(tuned), Path(out).absolute()
    check_new(out, "extract")
    _check_named(new, target_modules or ())
    with Progress("extract", new.nbytes, show=show_progress) as shown:
        differing = _differing(old, new, shown.advance)
        targets, saved = _sort(old, new, differing, target_modules, save_others)
        layers: dict[str, LayerError] = {}
        factors: dict[str, Tensor] = {}
        for path in targets:
            shown.note(path)
            delta = _difference(old, new, f"{path}.weight")
            best = approximate(delta.T.contiguous() if fan_in_fan_out else delta, rank, energy)
            layers[path] = LayerError(len(best.lora_A), best.norm, best.errors)
            factors[f"{KEY_PREFIX}{path}.lora_A.weight"] = best.lora_A.to(dtype)
            factors[f"{KEY_PREFIX}{path}.lora_B.weight"] = best.lora_B.to(dtype)
    whole = {f"{KEY_PREFIX}{key}": key for key in new if key.rpartition(".")[0] in saved}
    has_biases = any(f"{path}.bias" in differing for path in targets)
    if has_biases:  # PEFT then wants the biases of all adapted layers
        whole |= {f"{KEY_PREFIX}{path}.base_layer.bias": f"{path}.bias" for path in targets if f"{path}.bias" in new}
    tie = find_tie(new)
    is_tied = tie is not None and tie.embedding.rpartition(".")[0] in saved
    if is_tied:  # as PEFT saves it: again, so that the head does not keep the base's values
        whole[f"{KEY_PREFIX}{tie.head}"] = tie.embedding
        saved.append(tie.head.rpartition(".")[0])
    config = _config(layers, rank, saved, has_biases, fan_in_fan_out, new) | {"ensure_weight_tying": is_tied}
    table = {key: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for key, tensor in factors.items()}
    table |= {key: (new.info(source).dtype, new.info(source).shape) for key, source in whole.items()}
    with new_directory(out, "extract") as staging:
        stream_tensors(
            staging / WEIGHTS_FILE,
            table,
            {"format": "pt"},
            lambda key: factors[key] if key in factors else new.tensor(whole[key]),
        )
        (staging / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return ExtractReport(
        layers,
        _overall(layers),
        saved,
        unchanged=len(new) - len(differing),
        nbytes=(out / WEIGHTS_FILE).stat().st_size,
        seconds=time.perf_counter() - begin,
    )


# --- what differs -----------------------------------------------------------------------------------------------------


def _differing(old: Checkpoint, new: Checkpoint, advance: Callable[[int], None]) -> dict[str, None]:
    """The tensors of ``new`` that are not in ``old`` with the same shape and values, also in another dtype."""
    differing: dict[str, None] = {}
    for key in new:
        if key not in old or not _same(old, new, key):
            differing[key] = None
        advance(new.info(key).nbytes)
    return differing


def _same(old: Checkpoint, new: Checkpoint, key: str) -> bool:
    """Returns whether the two tensors have the same shape and bits, or the same values in two dtypes."""
    first, second = old.info(key), new.info(key)
    if first.shape != second.shape:
        return False
    before, after = old.tensor(key), new.tensor(key)
    if first.dtype != second.dtype:
        if not {first.torch_dtype, second.torch_dtype} <= set(FLOATING):
            return False
        wider = torch.promote_types(before.dtype, after.dtype)
        return torch.equal(before.to(wider), after.to(wider))
    return torch.equal(before.flatten().view(torch.uint8), after.flatten().view(torch.uint8))


def _sort(
    old: Checkpoint,
    new: Checkpoint,
    differing: Collection[str],
    target_modules: Sequence[str] | None,
    save_others: bool,
) -> tuple[list[str], list[str]]:
    """The modules to adapt, and the modules to save in full."""
    problems = [f"only in the base: {key}" for key in old if key not in new]
    targets: dict[str, None] = {}
    others: dict[str, str] = {}
    for key in differing:
        path, _, name = key.rpartition(".")
        shape = new.info(key).shape
        if key in old and old.info(key).shape != shape:
            problems.append(f"shape of {key}: {list(old.info(key).shape)} in the base, {list(shape)} in the other")
            continue
        wanted = not is_embedding(path) if target_modules is None else _covers(target_modules, path)
        is_matrix = key in old and name == "weight" and len(shape) == 2
        if wanted and is_matrix and {old.info(key).torch_dtype, new.info(key).torch_dtype} <= set(FLOATING):
            targets[path] = None
        else:
            others.setdefault(path, key)
    saved = []
    parents = {end for key in new for end in _parents(key)}
    for path, key in others.items():
        if path in targets and path not in parents:
            continue  # the bias of an adapted module
        if not path:
            problems.append(f"differs: {key}")
        elif path in targets:
            problems.append(f"differs, next to the adapted weight of its module: {key}")
        elif not save_others:
            problems.append(f"differs, and is not adapted: {key} {list(new.info(key).shape)}")
        elif heads := _other_users(new, path):
            problems.append(f"differs, and is shared with {heads}, which no adapter can express: {key}")
        else:
            saved.append(path)
    if problems:
        raise ValueError(f"extract: {new.directory} is not {old.directory} with an adapter:{listed(problems)}")
    if not targets:
        what = "no layer to adapt differs" if differing else "no tensor differs"
        raise ValueError(f"extract: {what} between {old.directory} and {new.directory}")
    return list(targets), saved


def _covers(names: Sequence[str], path: str) -> bool:
    return any(name_covers(name, path) for name in names)


def _check_named(new: Checkpoint, names: Sequence[str]) -> None:
    """Raises ValueError for names that cover no matrix: their layers would be saved in full instead."""
    matrices = _matrices(new)
    for name in names:
        if not any(name_covers(name, path) for path in matrices):
            known = dict.fromkeys(path.rpartition(".")[2] for path in matrices)
            raise ValueError(
                f"extract: target_modules: {name!r} names no matrix of {new.directory}, which has "
                f"{first_of(map(repr, known), 8)}"
            )


def _matrices(new: Checkpoint) -> list[str]:
    return [key.removesuffix(".weight") for key in new if key.endswith(".weight") and len(new.info(key).shape) == 2]


def _other_users(new: Checkpoint, path: str) -> str:
    """Names modules that share the embedding ``path``, and cannot follow it in PEFT's files; "" if there are none."""
    tie = find_tie(new)
    prefix, _, name = path.rpartition(".")
    if name == "shared" and any(key.startswith(f"{prefix}.encoder.".lstrip(".")) for key in new):  # T5, BART
        return "the embeddings of the encoder and the decoder"
    if tie is not None and tie.embedding == f"{path}.weight" and tie.head.count(".") > 1:  # a head in a module, of BERT
        return tie.head
    return ""


def _parents(key: str) -> list[str]:
    """The modules around a tensor, without the innermost one if the tensor is its weight or bias."""
    parts = key.split(".")
    last = len(parts) - (2 if parts[-1] in ("weight", "bias") else 1)
    return [".".join(parts[:count]) for count in range(1, last + 1)]


def _difference(old: Checkpoint, new: Checkpoint, key: str) -> Tensor:
    """The difference of a tensor, in float32, or in float64 if one of the two is F64."""
    tuned, base = new.tensor(key), old.tensor(key)
    acc = accumulation_dtype(torch.promote_types(tuned.dtype, base.dtype))
    delta = tuned.to(acc).sub_(base)
    if not delta.isfinite().all():
        raise ValueError(f"extract: {key} has NaN or infinite values in one of the checkpoints")
    return delta


# --- what is written --------------------------------------------------------------------------------------------------


def _config(
    layers: dict[str, LayerError], rank: int, saved: list[str], has_biases: bool, fan_in_fan_out: bool, new: Checkpoint
) -> dict[str, Any]:
    """The adapter's config. ``lora_alpha`` is the rank everywhere, so the scaling is 1."""
    ends = {path.rpartition(".")[2] for path in layers}
    by_end = {path for path in _matrices(new) if path.rpartition(".")[2] in ends}
    other_ranks = {re.escape(path): layer.r for path, layer in layers.items() if layer.r != rank}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "target_modules": sorted(ends) if by_end == set(layers) else sorted(layers),
        "modules_to_save": saved or None,
        "bias": "lora_only" if has_biases else "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "task_type": None,
        "base_model_name_or_path": None,
    }


def _overall(layers: dict[str, LayerError]) -> dict[int, float]:
    """Rank -> relative error of all layers together."""
    total = sum(layer.norm**2 for layer in layers.values())
    ranks = sorted({r for layer in layers.values() for r in layer.errors})

    def left(layer: LayerError, rank: int) -> float:
        return layer.norm * layer.errors[max((r for r in layer.errors if r <= rank), default=min(layer.errors))]

    return {rank: (sum(left(layer, rank) ** 2 for layer in layers.values()) / total) ** 0.5 for rank in ranks}
