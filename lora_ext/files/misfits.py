"""Checks that an adapter file fits a model: kinds, keys, shapes, dtypes, tied values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lora_ext._common.printable import first_shape, listed, shown
from lora_ext._common.sharded import is_partitioned, is_sharded
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile
from lora_ext.model.adapter_set import Adapter

# With bias="all" PEFT also writes the biases of modules_to_save under the names inside its wrappers.
_PEFT_DUPLICATES = (".original_module.bias", ".modules_to_save.bias")
_NOT_IN_SHAPES = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "enable_lora"),
    "trainable_token_indices",
)


def check_same_kind(adapter: Adapter, config: LoraConfig, file: AdapterFile) -> None:
    """Compares the options that tensor shapes do not show, such as scaling, parts of a weight and token indices."""
    for key in _NOT_IN_SHAPES:
        in_model, in_file = getattr(adapter.config, key), getattr(config, key)
        if in_model != in_file:
            raise ValueError(
                f"load_adapter: {file.directory} has {key}={shown(in_file)} but the model was injected with "
                f"{key}={shown(in_model)}; inject with the same config, or load under another adapter_name"
            )


def check_fits(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Compares keys, shapes and dtypes of ``targets`` with the file's. ValueError: they differ; all are listed."""
    keys = [key for key in file.tensors if not key.endswith(_PEFT_DUPLICATES)]
    missing = [f"missing key: {key}" for key in targets if key not in file.tensors]
    unexpected = [f"unexpected key: {key}" for key in keys if key not in targets]
    remedies = []
    if missing and len(unexpected) == len(keys):
        remedies.append(
            "all layers have other names: the file may be of another model, of a part of it (load it into that part), "
            "or of another version of Transformers, as with one adapter for each expert. PEFT converts some of these: "
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


def _refuse(problems: Iterable[str], file: AdapterFile) -> None:
    if problems:
        raise ValueError(f"load_adapter: {file.path} does not fit the model:{listed(first_shape(problems))}")
