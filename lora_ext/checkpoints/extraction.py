"""``lora-ext extract``: makes an adapter that approximates the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext._common.printable import first_of, listed
from lora_ext._common.progress import progress
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext._ops.checks import FLOATING, accumulation_dtype
from lora_ext.checkpoints.checkpoint_files import Checkpoint, raw_blocks
from lora_ext.checkpoints.low_rank import approximate
from lora_ext.checkpoints.merged_rows import BLOCK_BYTES, Block
from lora_ext.checkpoints.output import check_apart
from lora_ext.checkpoints.staging import Staging
from lora_ext.checkpoints.ties import is_embedding, tied_tensors
from lora_ext.checkpoints.writing import Description, write_file
from lora_ext.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from lora_ext.files.file_bytes import tensor_bytes
from lora_ext.files.safetensors_format import DTYPE_NAMES
from lora_ext.matching.path_names import name_covers

REPORT_FILE = "extract.json"


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
    overwrite: bool = False,
    show_progress: bool = False,
) -> ExtractReport:
    """Writes an adapter in PEFT's format to ``out`` that turns ``base`` into ``tuned``, up to the error in the report.

    Each matrix that differs is approximated by a truncated singular value decomposition of its difference
    (:func:`~lora_ext.checkpoints.low_rank.approximate`); the scaling is 1. One tensor is in memory at a time. Biases of
    adapted layers are saved in full (``bias="lora_only"``), and so are other modules that differ
    (``modules_to_save``). A head that shares the weight of a saved embedding follows it (``ensure_weight_tying``).

    Args:
        rank: largest rank of a layer.
        energy: in (0, 1]: each layer gets the smallest rank that keeps this part of its difference's squared norm.
        target_modules: names of layers, each a whole path or its end after a dot; None for all layers with a matrix
            ``weight`` except embeddings.
        save_others: save other modules that differ; if False, they are an error.
        fan_in_fan_out: matrices are ``[in, out]``, as in Conv1D (GPT-2).
        dtype: dtype of the factors.
        overwrite: replace the adapter at ``out``, if nothing else is there.

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
    old, new = Checkpoint.open(base), Checkpoint.open(tuned)
    out = Path(out).absolute()
    check_apart("extract", out, [old.directory, new.directory])
    staged = Staging(out, {}, overwrite, {CONFIG_FILE, WEIGHTS_FILE, REPORT_FILE}.__contains__)
    with staged as staging, progress("extract", new.nbytes, show=show_progress) as shown:
        differing: dict[str, None] = {}
        for key in new:
            if key not in old or not _same(old, new, key):
                differing[key] = None
            shown.advance(new.info(key).nbytes)
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
        modules = set(saved)
        whole = {f"{KEY_PREFIX}{key}": key for key in new if key.rpartition(".")[0] in modules}
        has_biases = any(f"{path}.bias" in differing for path in targets)
        if has_biases:  # PEFT then wants the biases of all adapted layers
            biases = [f"{path}.bias" for path in targets if f"{path}.bias" in new]
            whole |= {f"{KEY_PREFIX}{key.removesuffix('bias')}base_layer.bias": key for key in biases}
        twins = tied_tensors(new, modules)  # as PEFT saves them: again, so that they do not keep the base's values
        whole |= {f"{KEY_PREFIX}{key}": source for key, source in twins.items()}
        saved += sorted({key.rpartition(".")[0] for key in twins} - modules)
        _write(staging.path / WEIGHTS_FILE, new, factors, whole)
        config = _config(layers, rank, saved, has_biases, fan_in_fan_out, new) | {"ensure_weight_tying": bool(twins)}
        (staging.path / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        report = ExtractReport(
            layers,
            _overall(layers),
            saved,
            unchanged=len(new) - len(differing),
            nbytes=(staging.path / WEIGHTS_FILE).stat().st_size,
            seconds=time.perf_counter() - begin,
        )
        (staging.path / REPORT_FILE).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        for checkpoint in (old, new):
            checkpoint.check_unchanged("extract")
        staging.publish()
    return report


def _same(old: Checkpoint, new: Checkpoint, key: str) -> bool:
    """Returns whether the two tensors have the same shape and bits, or the same values in two dtypes."""
    first, second = old.info(key), new.info(key)
    if first.shape != second.shape:
        return False
    if first.dtype != second.dtype:
        if not {first.torch_dtype, second.torch_dtype} <= set(FLOATING):
            return False
        acc, size = accumulation_dtype(torch.promote_types(first.torch_dtype, second.torch_dtype)), BLOCK_BYTES // 8
        ends = ((at, min(at + size, math.prod(first.shape))) for at in range(0, math.prod(first.shape), size))
        return all(torch.equal(old.elements(key, *end).to(acc), new.elements(key, *end).to(acc)) for end in ends)
    pairs = zip(
        raw_blocks(old.file(key), first, BLOCK_BYTES), raw_blocks(new.file(key), second, BLOCK_BYTES), strict=True
    )
    return all(tensor_bytes(a) == tensor_bytes(b) for a, b in pairs)


def _sort(
    old: Checkpoint,
    new: Checkpoint,
    differing: Collection[str],
    target_modules: Sequence[str] | None,
    save_others: bool,
) -> tuple[list[str], list[str]]:
    """The modules to adapt, and the modules to save in full."""
    _check_named(new, target_modules or ())
    problems = [f"only in the base: {key}" for key in old if key not in new]
    targets: dict[str, None] = {}
    others: dict[str, str] = {}
    for key in differing:
        path, _, name = key.rpartition(".")
        shape = new.info(key).shape
        if key in old and old.info(key).shape != shape:
            problems.append(f"shape of {key}: {list(old.info(key).shape)} in the base, {list(shape)} in the other")
            continue
        wanted = not is_embedding(path) if target_modules is None else any(name_covers(t, path) for t in target_modules)
        is_matrix = key in old and name == "weight" and len(shape) == 2
        if wanted and is_matrix and {old.info(key).torch_dtype, new.info(key).torch_dtype} <= set(FLOATING):
            targets[path] = None
        else:
            others.setdefault(path, key)
    saved = []
    with_more = {end for key in new for end in _parents(key)}
    for path, key in others.items():
        if path in targets and path not in with_more:
            continue  # the bias of an adapted module
        if path in targets or not path:
            problems.append(f"differs, next to the adapted weight of its module: {key}" if path else f"differs: {key}")
        elif not save_others:
            problems.append(f"differs, and is not adapted: {key} {list(new.info(key).shape)}")
        else:
            saved.append(path)
    if problems:
        hint = ""
        if any(all(f"{prefix}{key}" in new for key in old) for prefix in _prefixes(old, new)):
            hint = (
                "\nIts names have a prefix, as those of a model with a head. Load the base as such a model "
                "(from_pretrained), save it (save_pretrained), and extract from that base"
            )
        raise ValueError(f"extract: {new.directory} is not {old.directory} with an adapter:{listed(problems)}{hint}")
    if not targets:
        what = "no layer to adapt differs" if differing else "no tensor differs"
        raise ValueError(f"extract: {what} between {old.directory} and {new.directory}")
    return list(targets), saved


def _check_named(new: Checkpoint, names: Sequence[str]) -> None:
    """Raises ValueError for names that cover no matrix: their layers would be saved in full instead."""
    matrices = [key.removesuffix(".weight") for key in new if key.endswith(".weight") and len(new.info(key).shape) == 2]
    if unknown := [name for name in names if not any(name_covers(name, path) for path in matrices)]:
        known = dict.fromkeys(path.rpartition(".")[2] for path in matrices)
        raise ValueError(
            f"extract: target_modules {unknown} name no matrix of {new.directory}; its matrices include "
            f"{first_of(map(repr, known), 8)}"
        )


def _prefixes(old: Checkpoint, new: Checkpoint) -> set[str]:
    """Returns what may precede the base's names in ``new``, such as the name of the encoder in a classifier."""
    first = next(iter(old), "")
    return {key.removesuffix(first) for key in new if key.endswith(f".{first}")}


def _parents(key: str) -> Iterator[str]:
    """The modules around a tensor, without the innermost one if the tensor is its weight or bias."""
    place = key.rfind(".")
    if key[place + 1 :] in ("weight", "bias"):
        place = key.rfind(".", 0, max(place, 0))
    while place >= 0:
        yield key[:place]
        place = key.rfind(".", 0, place)


def _difference(old: Checkpoint, new: Checkpoint, key: str) -> Tensor:
    """The difference of a tensor, in float32, or in float64 if one of the two is F64."""
    tuned, base = new.tensor(key), old.tensor(key)
    acc = accumulation_dtype(torch.promote_types(tuned.dtype, base.dtype))
    delta = tuned.to(acc).sub_(base)
    if not delta.isfinite().all():
        raise ValueError(f"extract: {key} has NaN or infinite values in one of the checkpoints")
    return delta


def _write(path: Path, new: Checkpoint, factors: dict[str, Tensor], whole: dict[str, str]) -> None:
    described: dict[str, Description] = {
        key: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for key, tensor in factors.items()
    }
    for key, source in whole.items():
        info = new.info(source)
        described[key] = info.dtype, info.shape, info.nbytes

    def blocks(key: str) -> Iterator[Block]:
        if key in factors:
            yield Block(factors[key])
            return
        for values in raw_blocks(new.file(whole[key]), new.info(whole[key]), BLOCK_BYTES):
            yield Block(values)

    write_file(path, described, {"format": "pt"}, blocks)


def _config(
    layers: dict[str, LayerError], rank: int, saved: list[str], has_biases: bool, fan_in_fan_out: bool, new: Checkpoint
) -> dict[str, Any]:
    """The adapter's config. ``lora_alpha`` is the rank everywhere, so the scaling is 1."""
    ends = {path.rpartition(".")[2] for path in layers}
    matrices = {key.removesuffix(".weight") for key in new if key.endswith(".weight") and len(new.info(key).shape) == 2}
    by_end = {path for path in matrices if path.rpartition(".")[2] in ends}
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
