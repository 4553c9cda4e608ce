"""Checks that an adapter file fits a model: kinds, keys, shapes, dtypes, tied values, the layout of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from lora_ext._common.printable import first_shape, listed, shown
from lora_ext._common.sharded import is_partitioned, is_sharded
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile, is_duplicate
from lora_ext.model.adapter_set import Adapter, Part
from lora_ext.nn.parameter import LoraParameter

_NOT_IN_SHAPES = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "enable_lora"),
    "trainable_token_indices",
)


def check_same_kind(adapter: Adapter, config: LoraConfig, file: AdapterFile) -> None:
    """Compares the options that tensor shapes do not show. ValueError: one differs."""
    for key in _NOT_IN_SHAPES:
        in_model, in_file = getattr(adapter.config, key), getattr(config, key)
        if in_model != in_file:
            raise ValueError(
                f"load_adapter: {file.directory} has {key}={shown(in_file)} but the model was injected with "
                f"{key}={shown(in_model)}; inject with the same config, or load under another adapter_name"
            )


def check_fits(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Compares keys, shapes and dtypes of ``targets`` with the file's. ValueError: they differ; all are listed."""
    keys = [key for key in file.tensors if not is_duplicate(key)]
    missing = [f"missing key: {key}" for key in targets if key not in file.tensors]
    unexpected = [f"unexpected key: {key}" for key in keys if key not in targets]
    remedies = []
    if missing and len(unexpected) == len(keys):
        remedies.append(
            "all layers have other names: the file is of another model, of a part of it (load it into that), or of "
            "another Transformers, as with one adapter for each expert. PEFT converts some of these: "
            "PeftModel.from_pretrained(model, directory).save_pretrained(another)"
        )
    _refuse([*remedies, *missing, *unexpected, *misfits(targets, file.tensors)], file)


def misfits(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Describes the tensors whose shape or kind of dtype differs from that of the model's ``targets``, a line each."""
    problems = []
    for key, target in targets.items():
        if key not in tensors:
            continue
        shape, dtype = list(tensors[key].shape), tensors[key].dtype
        if is_partitioned(target):
            problems.append(f"{key}: DeepSpeed's ZeRO-3 has partitioned it in the model; load before that")
            continue
        if shape != list(target.shape):
            problems.append(f"shape of {key}: {shown(shape)} in the file, {list(target.shape)} in the model")
        if dtype.is_floating_point != target.is_floating_point() or dtype.is_complex:
            problems.append(f"dtype of {key}: {dtype} in the file, {target.dtype} in the model")
    return problems


def check_places(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Checks that the targets have memory and that targets sharing memory get equal values. ValueError: they do not."""
    problems = []
    filled: dict[tuple[torch.device, int], str] = {}
    for key, target in targets.items():
        if target.is_meta:
            problems.append(f"device of {key}: the model is on the meta device; give it memory (to_empty) first")
        elif target.numel() and not is_sharded(target):  # a tied DTensor gets the same values twice
            twin = filled.setdefault((target.device, target.data_ptr()), key)
            if twin != key and not torch.equal(file.tensors[twin], file.tensors[key]):
                problems.append(f"values of {key}: tied to {twin} in the model, but they differ in the file")
    _refuse(problems, file)


VERSION_KEY = "peft_version"


def check_expert_layout(adapter: Adapter, file: AdapterFile) -> None:
    """Checks that no square experts in ``file`` may have the layout of an old PEFT. ValueError: some may.

    Stacked experts have ``lora_A [r * num_experts, in_features]`` and ``lora_B [out_features, r * num_experts]``. PEFT
    before 0.19.1 exchanged the two sizes for some parameters. Then the shapes do not fit, except those of squares.
    """
    version = file.config.get(VERSION_KEY)
    for part in stacked_experts(adapter):
        key = f"{KEY_PREFIX}{part.file_path}.lora_A.weight"
        is_square = part.adapter.lora_A.shape[1] == part.adapter.lora_B.shape[0]
        if is_square and key in file.tensors and not has_present_layout(version):
            raise ValueError(
                f"load_adapter: {file.path}: {key} is of square experts, whose factors PEFT exchanged before 0.19.1; "
                f'{VERSION_KEY} in {CONFIG_FILE} is {shown(version)}: merge it with that PEFT, or set "0.19.1" if a '
                "later one saved it"
            )


def stacked_experts(adapter: Adapter) -> Iterator[Part]:
    """Yields the parts of an adapter that adapt a parameter ``[num_experts, ...]``."""
    return (part for part in adapter.parts if isinstance(part.layer, LoraParameter) and part.layer.weight.dim() == 3)


def has_present_layout(version: object) -> bool:
    """Returns whether ``version`` is a release of PEFT, from 0.19.1 on."""
    text = version if isinstance(version, str) else ""
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?!\.?(dev|rc|a|b))", text)
    return found is not None and tuple(map(int, found.groups()[:3])) >= (0, 19, 1)


def _refuse(problems: Iterable[str], file: AdapterFile) -> None:
    if problems:
        raise ValueError(f"load_adapter: {file.path} does not fit the model:{listed(first_shape(problems))}")
