"""Folds the scaling of an adapter into its factors, so that programs that read less of the config compute the same."""

from __future__ import annotations

import dataclasses
import os

from torch import Tensor
from torch.nn import functional as F

from lora_ext.files.adapter_file import OWN_KEY, AdapterFile
from lora_ext.files.contents import AdapterContents, contents_of
from lora_ext.files.writing import new_directory


def normalise(adapter: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Writes the adapter in ``adapter`` to the new directory ``out`` as ``save_adapter(normalise=True)`` saves it.

    ValueError: the adapter is not LoRA, or a factor times its scaling is too large for its dtype. Errors of files as of
    :func:`lora_ext.checkpoints.merge`.
    """
    file = normalised(AdapterFile.open(adapter, caller="normalise"), caller="normalise")
    with new_directory(out, "normalise") as staging:
        file.write(staging)


def normalised(file: AdapterFile, *, caller: str) -> AdapterFile:
    """Returns the adapter with one rank for all layers, and the scaling 1 in all readings: ``lora_alpha`` is ``r``.

    ``lora_B`` and its bias are multiplied by their layer's scaling, and rounded to their dtype. Factors of a lower rank
    than the highest get rows and columns of zeros. ``rank_pattern``, ``alpha_pattern`` and ``use_rslora`` are empty.

    ValueError: as :func:`~lora_ext.files.contents.contents_of`; or a product is infinite in its dtype.
    """
    contents = contents_of(file, caller=caller)
    if not contents.updates:
        return file
    rank, tensors = max(update.r for update in contents.updates), dict(file.tensors)
    for update in contents.updates:
        key = update.key.replace("lora_A.weight", "lora_B.weight").replace("lora_embedding_A", "lora_embedding_B")
        bias = f"{key.removesuffix('.weight')}.bias"
        tensors[update.key], B = padded(update.lora_A, update.lora_B, rank, update.matrices)
        for name, tensor in {key: B, bias: tensors.get(bias)}.items():
            if tensor is not None:
                tensors[name] = _scaled(tensor, update.scaling, f"{caller}: {name}")
    config = {**file.config, "r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}}
    metadata = {name: value for name, value in file.metadata.items() if name != OWN_KEY}
    return dataclasses.replace(file, config={**config, "use_rslora": False}, tensors=tensors, metadata=metadata)


def padded(lora_A: Tensor, lora_B: Tensor, rank: int, matrices: int = 1) -> tuple[Tensor, Tensor]:
    """Returns the factors of each of the ``matrices`` with zeros up to ``rank``; their products are the same.

    ``lora_A [matrices * r, ...]``, ``lora_B [out, r * matrices, ...]``, where the matrix is the faster index.
    """
    A, B = lora_A.unflatten(0, (matrices, -1)), lora_B.unflatten(1, (-1, matrices))
    more = rank - B.shape[1]
    A, B = (F.pad(factor, (0, 0) * (factor.dim() - 2) + (0, more)) for factor in (A, B))
    return A.flatten(0, 1), B.flatten(1, 2)


def _scaled(tensor: Tensor, scaling: float, name: str) -> Tensor:
    result = (tensor.double() * scaling).to(tensor.dtype)
    if not result.isfinite().all() and tensor.isfinite().all():
        raise ValueError(f"{name} times its scaling {scaling:g} is too large for {tensor.dtype}; want a wider dtype")
    return result


def misreadings(contents: AdapterContents) -> list[str]:
    """Describes what of an adapter other programs are known to read in another way, or to refuse."""
    config, updates, found = contents.file.config, contents.updates, []
    if len({update.r for update in updates}) > 1 or len({update.scaling for update in updates}) > 1:
        found.append(
            "ranks or scalings differ by layer (rank_pattern, alpha_pattern): vLLM scales all layers by lora_alpha / r "
            "of the config, and llama.cpp reads no alpha_pattern"
        )
    if config.get("use_rslora"):
        found.append("use_rslora: llama.cpp scales by lora_alpha / r, not by lora_alpha / sqrt(r)")
    if any(update.scaling != 1 for update in updates):
        found.append("lora_alpha is not r: diffusers scales by 1 if the file has no metadata of its own")
    if found:
        found.append("normalising folds these into the factors (lora-ext normalise, save_adapter(normalise=True))")
    if "use_dora" in contents.options:
        found.append("use_dora: vLLM and llama.cpp refuse it")
    if "lora_bias" in contents.options:
        found.append("lora_bias: llama.cpp refuses it")
    if any(update.kind == "parameter" for update in updates):
        found.append("target_parameters: keys do not name the parameter, and only PEFT and lora_ext know the order")
    if contents.replaced or contents.tokens:
        found.append("tensors saved in full (modules_to_save, tokens, biases): vLLM and llama.cpp refuse most of them")
    if not config.get("base_model_name_or_path"):
        found.append("base_model_name_or_path is empty: llama.cpp's converter needs --base")
    return found
