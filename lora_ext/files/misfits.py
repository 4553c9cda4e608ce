"""Checks that an adapter file fits a model: options, keys, shapes, dtypes, tied values, the layout of experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_ext._common.messages import listed, shown
from lora_ext._common.sharded import is_partitioned, is_sharded
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import CONFIG_FILE, AdapterFile, is_duplicate
from lora_ext.model.adapter_set import Adapter, Part
from lora_ext.nn.parameter import LoraParameter

VERSION_KEY = "peft_version"
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


def misfits(targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[str]:
    """Describes how a file's ``tensors`` differ from the model's ``targets`` in keys, shapes and kinds of dtypes.

    Of wrong shapes it has the first and how many others there are: they have one cause.
    """
    problems = [f"missing key: {key}" for key in targets if key not in tensors]
    problems += [f"unexpected key: {key}" for key in tensors if key not in targets]
    shapes = []
    for key in (key for key in targets if key in tensors):
        target, shape, dtype = targets[key], list(tensors[key].shape), tensors[key].dtype
        if is_partitioned(target):
            problems.append(f"{key}: DeepSpeed's ZeRO-3 has partitioned it in the model; load before that")
            continue
        if shape != list(target.shape):
            shapes.append(f"shape of {key}: {shown(shape)} in the file, {list(target.shape)} in the model")
        if dtype.is_floating_point != target.is_floating_point() or dtype.is_complex:
            problems.append(f"dtype of {key}: {dtype} in the file, {target.dtype} in the model")
    more = f" (and {len(shapes) - 1} other shapes)" if len(shapes) > 1 else ""
    return problems + [shape + more for shape in shapes[:1]]


def check_fits(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Compares keys, shapes and dtypes of ``targets`` with the file's. ValueError: they differ; all are listed."""
    tensors = {key: tensor for key, tensor in file.tensors.items() if key in targets or not is_duplicate(key)}
    problems = misfits(targets, tensors)
    if targets.keys().isdisjoint(tensors):
        problems.insert(
            0,
            "all layers have other names: the file is of another model, of a part of it (load it into that), or of "
            "another Transformers, as with one adapter for each expert. PEFT converts some of these: "
            "PeftModel.from_pretrained(model, directory).save_pretrained(another)",
        )
    _refuse(problems, file)


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


def _refuse(problems: Sequence[str], file: AdapterFile) -> None:
    if problems:
        raise ValueError(f"load_adapter: {file.path} does not fit the model:{listed(problems)}")


# --- experts ----------------------------------------------------------------------------------------------------------


def check_expert_layout(adapter: Adapter, file: AdapterFile) -> None:
    """Checks that no square experts in ``file`` may have the layout of an old PEFT. ValueError: some may.

    Stacked experts have ``lora_A [r * num_experts, in_features]`` and ``lora_B [out_features, r * num_experts]``. PEFT
    before 0.19.1 exchanged the two sizes for some parameters. Then the shapes do not fit, except those of squares.
    """
    version = file.config.get(VERSION_KEY)
    for part in () if has_present_layout(version) else stacked_experts(adapter):
        key = f"{part.file_path}.lora_A.weight"
        if key in file.tensors and part.adapter.lora_A.shape[1] == part.adapter.lora_B.shape[0]:
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
    found = re.match(r"(\d{1,9})\.(\d{1,9})\.(\d{1,9})(?!\.?(dev|rc|a|b))", str(version))
    return found is not None and tuple(map(int, found.groups()[:3])) >= (0, 19, 1)
