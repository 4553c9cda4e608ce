"""``lora-ext extract``: makes an adapter that approximates the difference of two checkpoints."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from lora_ext._common.messages import listed
from lora_ext._common.modules import KEY_PREFIX
from lora_ext._common.progress import Progress
from lora_ext._ops.checks import FLOATING, accumulation_dtype
from lora_ext.checkpoints.checkpoint import Checkpoint, find_tie, is_embedding
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import CONFIG_FILE, WEIGHTS_FILE
from lora_ext.files.normalising import padded
from lora_ext.files.writing import check_new, new_directory, stream_tensors, write_json

_EXACT_SIZE = 512  # up to this size the full decomposition takes well under a second
_ITERATIONS = 4  # slowly falling singular values, as after fine-tuning, need more than one subspace iteration


@dataclasses.dataclass(frozen=True)
class LayerError:
    """The error of a layer's approximation."""

    r: int  # rank of the factors
    norm: float  # Frobenius norm of the difference
    error: float  # norm of what the factors leave over the difference's norm


@dataclasses.dataclass(frozen=True)
class ExtractReport:
    """The result of an extraction."""

    layers: dict[str, LayerError]  # by path, the layers that differ and are adapted
    error: float  # relative error of these together
    saved: list[str]  # modules that differ and are saved in full
    unchanged: int  # number of equal tensors
    nbytes: int  # of the adapter's weights
    seconds: float


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int = 16,
    fan_in_fan_out: bool = False,
    dtype: torch.dtype = torch.float32,
    normalise: bool = False,
    show_progress: bool = False,
) -> ExtractReport:
    """Writes an adapter in PEFT's format to ``out`` that turns ``base`` into ``tuned``, up to the error in the report.

    Each matrix that differs, except embeddings, is approximated by a truncated singular value decomposition of its
    difference; the scaling is 1. One tensor of each checkpoint is in memory at a time, next to the adapter. Biases of
    adapted layers are saved in full (``bias="lora_only"``), and so are other modules that differ
    (``modules_to_save``), with the head that shares the weight of a saved embedding.

    Args:
        rank: of all layers; the smaller side of a matrix is a limit too.
        fan_in_fan_out: matrices are ``[in, out]``, as in Conv1D (GPT-2).
        dtype: dtype of the factors.
        normalise: give all layers the same rank in the file, by zeros, for engines that read no ``rank_pattern``.

    Raises:
        ValueError: nothing differs; tensors are in only one checkpoint, differ in shape, or differ and cannot be saved
            with an adapter (the message lists all of them); another argument is wrong.
        FileNotFoundError, FileExistsError, OSError: as :func:`~lora_ext.checkpoints.merge`.
    """
    begin = time.perf_counter()
    if rank < 1:
        raise ValueError(f"extract: rank is {rank}, want at least 1")
    old, new, out = Checkpoint.open(base), Checkpoint.open(tuned), Path(out).absolute()
    check_new(out, "extract")
    layers: dict[str, LayerError] = {}
    tensors: dict[str, Tensor] = {}
    with Progress("extract", new.nbytes, show=show_progress) as shown:
        differing = []
        for key in new:
            differing += [key] if _differ(old, new, key) else []
            shown.advance(new[key].nbytes)
        targets, saved = _sort(old, new, differing)
        for path in targets:
            shown.note(path)
            delta = _difference(old, new, f"{path}.weight")
            A, B, layers[path] = approximate(delta.T.contiguous() if fan_in_fan_out else delta, rank)
            if normalise:
                A, B = padded(A, B, rank)
            tensors[f"{KEY_PREFIX}{path}.lora_A.weight"] = A.to(dtype)
            tensors[f"{KEY_PREFIX}{path}.lora_B.weight"] = B.to(dtype)
    whole = {f"{KEY_PREFIX}{key}": key for key in new if key.rpartition(".")[0] in saved}
    has_biases = any(f"{path}.bias" in differing for path in targets)
    if has_biases:  # PEFT then wants the biases of all adapted layers
        whole |= {f"{KEY_PREFIX}{path}.base_layer.bias": f"{path}.bias" for path in targets if f"{path}.bias" in new}
    tie = find_tie(new)
    if tie is not None and tie.embedding.rpartition(".")[0] in saved:  # the head would keep the base's values
        whole[f"{KEY_PREFIX}{tie.head}"] = tie.embedding
        saved.append(tie.head.rpartition(".")[0])
    table = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    table |= {key: (new[source].dtype, new[source].shape) for key, source in whole.items()}

    def values(key: str) -> list[Tensor]:
        return [tensors[key] if key in tensors else new.tensor(whole[key])]

    ranks = {} if normalise else {re.escape(path): layer.r for path, layer in layers.items() if layer.r != rank}
    with new_directory(out, "extract") as staging:
        stream_tensors(staging / WEIGHTS_FILE, table, {"format": "pt"}, values)
        config = LoraConfig(  # the alpha of every layer is its rank, so the scaling is 1
            r=rank,
            lora_alpha=rank,
            rank_pattern=ranks,
            alpha_pattern=ranks,
            target_modules=sorted(layers),
            modules_to_save=saved or None,
            bias="lora_only" if has_biases else "none",
            fan_in_fan_out=fan_in_fan_out,
            inference_mode=True,
        )
        write_json(staging / CONFIG_FILE, config.to_dict())
    unchanged, nbytes = len(new) - len(differing), (out / WEIGHTS_FILE).stat().st_size
    norm = math.hypot(*(layer.norm for layer in layers.values())) or 1.0
    error = math.hypot(*(layer.norm * layer.error for layer in layers.values())) / norm
    return ExtractReport(layers, error, saved, unchanged, nbytes, time.perf_counter() - begin)


def approximate(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, LayerError]:
    """Computes a truncated singular value decomposition of ``delta [out, in]``, and overwrites it by the remainder.

    Small matrices are decomposed in full, larger ones by a randomised method (Halko, Martinsson, Tropp, arXiv
    0909.4061, algorithm 4.4): with twice as many vectors as the rank, the error is within 1 % of the best one.

    Returns:
        ``lora_A [r, in]`` and ``lora_B [out, r]``, each with the roots of the singular values, and the error.
    """
    rank = min(rank, *delta.shape)
    norm = torch.linalg.vector_norm(delta, dtype=torch.float64).item()
    vectors = 2 * max(rank, 8)
    if min(delta.shape) <= max(_EXACT_SIZE, 2 * vectors):
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # so that the same files give the same adapter
            U, S, V = torch.svd_lowrank(delta, q=vectors, niter=_ITERATIONS)
        Vh = V.T
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    # The norm of the actual remainder: a difference of squares would lose one that is small next to the norm.
    left = torch.linalg.vector_norm(delta.addmm_(B, A, alpha=-1), dtype=torch.float64).item()
    return A.contiguous(), B.contiguous(), LayerError(rank, norm, left / (norm or 1.0))


# --- what differs -----------------------------------------------------------------------------------------------------


def _differ(old: Checkpoint, new: Checkpoint, key: str) -> bool:
    """Returns whether a tensor of ``new`` is not in ``old``, or has another shape or values; not only another dtype."""
    if key not in old or old[key].shape != new[key].shape:
        return True
    before, after = old.tensor(key), new.tensor(key)
    if before.dtype == after.dtype:
        return not torch.equal(before.flatten().view(torch.uint8), after.flatten().view(torch.uint8))
    if not {before.dtype, after.dtype} <= set(FLOATING):
        return True
    wider = torch.promote_types(before.dtype, after.dtype)
    return not torch.equal(before.to(wider), after.to(wider))


def _sort(old: Checkpoint, new: Checkpoint, differing: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the modules to adapt, and the modules to save in full."""
    problems = [f"only in the base: {key}" for key in old if key not in new]
    targets: dict[str, None] = {}
    others: list[str] = []
    for key in differing:
        path, _, name = key.rpartition(".")
        shape = new[key].shape
        if key in old and old[key].shape != shape:
            problems.append(f"shape of {key}: {list(old[key].shape)} in the base, {list(shape)} in the other")
            continue
        is_matrix = key in old and name == "weight" and len(shape) == 2 and not is_embedding(path)
        if is_matrix and {old[key].dtype, new[key].dtype} <= set(FLOATING):
            targets[path] = None
        else:
            others.append(key)
    saved: dict[str, None] = {}
    for key in others:
        path = key.rpartition(".")[0]
        if key.removesuffix(".bias") in targets:
            continue
        if not path:
            problems.append(f"differs: {key}")
        elif path in targets:
            problems.append(f"differs, next to the adapted weight of its module: {key}")
        elif users := _other_users(new, path):
            problems.append(f"differs, and is shared with {users}, which no adapter can express: {key}")
        else:
            saved[path] = None
    if problems:
        raise ValueError(f"extract: {new.directory} is not {old.directory} with an adapter:{listed(problems)}")
    if not targets:
        what = "no layer to adapt differs" if differing else "no tensor differs"
        raise ValueError(f"extract: {what} between {old.directory} and {new.directory}")
    return list(targets), list(saved)


def _other_users(new: Checkpoint, path: str) -> str:
    """Names modules that share the embedding ``path``, and cannot follow it in PEFT's files; "" if there are none."""
    tie = find_tie(new)
    prefix, _, name = path.rpartition(".")
    if name == "shared" and any(key.startswith(f"{prefix}.encoder.".lstrip(".")) for key in new):  # T5, BART
        return "the embeddings of the encoder and the decoder"
    if tie is not None and tie.embedding == f"{path}.weight" and tie.head.count(".") > 1:  # a head in a module, of BERT
        return tie.head
    return ""


def _difference(old: Checkpoint, new: Checkpoint, key: str) -> Tensor:
    """The difference of a tensor, in float32, or in float64 if one of the two is F64."""
    tuned, base = new.tensor(key), old.tensor(key)
    acc = accumulation_dtype(torch.promote_types(tuned.dtype, base.dtype))
    delta = tuned.to(acc).sub_(base)
    if not delta.isfinite().all():
        raise ValueError(f"extract: {key} has NaN or infinite values in one of the checkpoints")
    return delta
