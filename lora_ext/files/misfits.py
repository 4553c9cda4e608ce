"""Checks that an adapter file fits a model (kinds, keys, shapes, dtypes, tied values), and names the remedies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_ext._common.printable import first_shape, listed, shown
from lora_ext._common.sharded import is_partitioned, is_sharded
from lora_ext._common.wrapped import KEY_PREFIX
from lora_ext.config import LoraConfig
from lora_ext.files.adapter_file import AdapterFile, TensorFile
from lora_ext.model.adapter_set import Adapter
from lora_ext.model.bare_model import BareModel, root_module
from lora_ext.model.saver import has_save_pretrained

_LAYER = re.compile(r"\.lora_[^.]*|\.[^.]*$")  # what follows the path of a layer in a key
_OF_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
# With bias="all" PEFT also writes the biases of modules_to_save under the names inside its wrappers.
_PEFT_DUPLICATES = (".original_module.bias", ".modules_to_save.bias")


def check_same_kind(adapter: Adapter, config: LoraConfig, directory: Path) -> None:
    """Compares the options that tensor shapes do not show, such as scaling, parts of a weight and token indices."""
    for key in (
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "enable_lora",
        "alora_invocation_tokens",
        "trainable_token_indices",
    ):
        in_model, in_file = getattr(adapter.config, key), getattr(config, key)
        if in_model != in_file:
            raise ValueError(
                f"load_adapter: {directory} has {key}={shown(in_file)} but the model was injected with "
                f"{key}={shown(in_model)}; inject with the same config, or load under another adapter_name"
            )


def check_shapes(model: nn.Module, targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Compares keys, shapes and dtypes of ``targets`` with the file's, without reading a tensor."""
    keys = [key for key in file.keys() if not key.endswith(_PEFT_DUPLICATES)]  # noqa: SIM118  not a dict
    problems = [f"missing key: {key}" for key in targets if key not in file]
    unexpected = [key for key in keys if key not in targets]
    if problems and any(_OF_ONE_EXPERT.search(key) for key in unexpected):
        problems.insert(0, "the layout of experts: one adapter for each expert, as in Transformers 4; PEFT converts it")
    if problems and (part := _part_of(model, unexpected)) is not None:
        problems.insert(0, f"the file is of a part: load_adapter(model.get_submodule({part!r}), directory) loads it")
    elif problems and file.config.get("ensure_weight_tying") and not unexpected:
        problems.insert(
            0,
            "the config has ensure_weight_tying, and the file has nothing for the tied module: PEFT ties only modules "
            'named lm_head or embed_tokens; set "ensure_weight_tying": false',
        )
    elif problems and unexpected == keys:
        problems.insert(
            0,
            "all layers have other names: the file may be of another model, or of another version of Transformers. PEFT"
            " converts some of these: PeftModel.from_pretrained(model, directory).save_pretrained(another)",
        )
    problems += [f"unexpected key: {key}" for key in unexpected]
    if (size := _other_vocabulary(model, targets, file)) is not None:
        problems.insert(
            0, f"the file is of a model with {size} tokens: model.resize_token_embeddings({size}) before it is injected"
        )
    problems += misfits(targets, file)
    _raise_misfit(problems, file)


def _other_vocabulary(model: nn.Module, targets: Mapping[str, Tensor], file: AdapterFile) -> int | None:
    """Returns the number of tokens in the file's model, if a tensor differs from the model's in it alone."""
    weight = getattr(BareModel(root_module(model)).embedding, "weight", None)
    for key, target in targets.items() if weight is not None else ():
        if key in file and len(file.shape(key)) == target.dim():
            differing = [sizes for sizes in zip(file.shape(key), target.shape, strict=True) if sizes[0] != sizes[1]]
            if len(differing) == 1 and differing[0][1] == weight.shape[0]:
                return differing[0][0]
    return None


def _part_of(model: nn.Module, keys: list[str]) -> str | None:
    """The path of a part that has a ``save_pretrained`` of its own and the layers of these ``keys``, if there is one.

    sentence-transformers saves the parts of a model one by one.
    """
    modules = BareModel(root_module(model)).modules
    layers = {_LAYER.split(key.removeprefix(KEY_PREFIX))[0] for key in keys}
    parts = (path for path, module in modules.items() if has_save_pretrained(module))
    return next((part for part in parts if layers and all(f"{part}.{layer}" in modules for layer in layers)), None)


def misfits(targets: Mapping[str, Tensor], file: TensorFile) -> list[str]:
    """Describes the tensors whose shape or kind of dtype differs from the model's, one line per problem."""
    problems = []
    for key, target in targets.items():
        if key not in file:
            continue
        if is_partitioned(target):
            problems.append(f"{key}: DeepSpeed's ZeRO-3 has partitioned it in the model; load before that")
            continue
        shape, dtype = file.shape(key), file.dtype(key)
        if shape != tuple(target.shape):
            problems.append(f"shape of {key}: {shown(list(shape))} in the file, {list(target.shape)} in the model")
        if dtype.is_floating_point != target.is_floating_point() or dtype.is_complex:
            problems.append(f"dtype of {key}: {dtype} in the file, {target.dtype} in the model")
    return problems


def check_places(targets: Mapping[str, Tensor], file: AdapterFile) -> None:
    """Checks that the targets have memory and that targets sharing memory get equal values."""
    problems = []
    filled: dict[tuple[torch.device, int], str] = {}
    for key, target in targets.items():
        if target.is_meta:
            problems.append(f"device of {key}: the model is on the meta device; give it memory (to_empty) first")
            continue
        if not target.numel():
            continue
        if is_sharded(target):  # tied parameters are one DTensor, and its parts get the same values twice
            continue
        twin = filled.setdefault((target.device, target.data_ptr()), key)  # tied modules hold one tensor under two keys
        if twin != key and not torch.equal(*(in_order_of(targets[k], file.tensor(k)) for k in (twin, key))):
            problems.append(f"values of {key}: tied to {twin} in the model, but they differ in the file")
    _raise_misfit(problems, file)


def _raise_misfit(problems: list[str], file: AdapterFile) -> None:
    if problems:
        raise ValueError(f"load_adapter: {file.path} does not fit the model:{listed(first_shape(problems))}")


def in_order_of(target: Tensor, values: Tensor) -> Tensor:
    """Returns ``values`` flattened in the memory order of ``target``; a tied head may be transposed."""
    return values.permute(sorted(range(values.dim()), key=lambda dim: -target.stride(dim))).flatten()
