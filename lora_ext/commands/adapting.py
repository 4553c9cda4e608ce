"""Loads the model of a fine-tuning run, quantised if wanted, and adapts it by the method that the options name."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from lora_ext._common.modules import embeddings_of
from lora_ext.commands.options import CommandError, check_installed, names_of, refusing
from lora_ext.commands.training_options import TaskOptions
from lora_ext.methods import (
    ARCHITECTURES,
    apply_method,
    head_parameters,
    new_method,
    option_names,
    set_pooling,
)
from lora_ext.methods.lora import linear_layers_of


def load_model(auto_class: Any, options: TaskOptions, source: dict[str, Any], **config: Any) -> tuple[Any, set[str]]:
    """Loads a model, with its frozen weights quantised if ``options`` say so.

    Args:
        source: arguments of ``from_pretrained`` that name the checkpoint.
        config: further ones, such as ``num_labels``.

    Returns:
        The model, and the names of parameters that the checkpoint has no values for.

    CommandError: there is no such model, or it is quantised already.
    """
    logging.set_verbosity_error()  # Transformers reports every new head; missing weights are checked below
    with refusing(f"--model {options.model}", RuntimeError, SafetensorError, KeyError):
        how = {} if options.quantize == "none" else _quantization(auto_class, options, source, config)
        model, loaded = auto_class.from_pretrained(
            **source, **config, **how, dtype=getattr(torch, options.dtype), output_loading_info=True
        )
    if wrong := sorted({name for name, *_ in loaded["mismatched_keys"]} - head_parameters(model).keys()):
        raise CommandError(f"--model {options.model}: {wrong[0]} has another shape than its config.json says")
    return model, set(loaded["missing_keys"])


def _quantization(auto_class: Any, options: TaskOptions, source: dict[str, Any], config: dict[str, Any]) -> dict:
    """Returns the argument of ``from_pretrained`` that quantises all linear layers that are not trained (QLoRA).

    The new head, a language model's output layer and ``modules_to_save`` stay as they are.
    """
    check_installed("quantize", "bitsandbytes")
    known = AutoConfig.from_pretrained(**source, **config)
    if getattr(known, "quantization_config", None) is not None:
        raise CommandError(f"--quantize {options.quantize}: {options.model} is quantised already; leave --quantize out")
    with torch.device("meta"):
        skeleton = auto_class.from_config(known)
    last, trained = skeleton.get_output_embeddings(), tuple(names_of(options.modules_to_save or ""))
    skipped = {name.rpartition(".")[0] for name in head_parameters(skeleton)}
    skipped |= {
        name for name, module in skeleton.named_modules() if module is last or (trained and name.endswith(trained))
    }
    how: dict[str, Any] = {"load_in_8bit": True}
    if options.quantize == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        how["bnb_4bit_compute_dtype"] = getattr(torch, options.dtype)
    return {"quantization_config": BitsAndBytesConfig(**how, llm_int8_skip_modules=sorted(skipped))}


def adapt(model: PreTrainedModel, options: TaskOptions, drawn: Collection[str]) -> PreTrainedModel:
    """Applies the method of ``options`` to ``model``, in place.

    Args:
        drawn: parameters that the checkpoint has no values for.

    CommandError: the method does not fit the model, an option is wrong, or drawn weights would stay untrained.
    """
    values = {
        **vars(options),
        **lora_targets(model, options.lora_targets),
        "r": options.lora_r,
        "modules_to_save": _modules_to_save(model, options),
        "base_model_name_or_path": options.model,
    }
    saved = tuple(values["modules_to_save"] or ())
    covered = tuple(f"{path}." for path, _ in model.named_modules() if saved and path.endswith(saved))
    names = {name for name, _ in model.named_parameters()} & {*drawn} - head_parameters(model).keys()
    missing = sorted({name.rpartition(".")[0] for name in names if not name.startswith(covered)})
    if missing and "full" not in options.method.split("+"):
        raise CommandError(
            f"--model {options.model} has no values for {', '.join(missing)}, which would stay random and in no file; "
            f"train them, too: --modules_to_save {','.join(missing)} with --method lora, or --method full"
        )
    wanted = {option for name in options.method.split("+") for option in option_names(name)}
    with refusing(f"--method {options.method}", TypeError):
        method = new_method(options.method, **{name: value for name, value in values.items() if name in wanted})
        return apply_method(model, method)


def _modules_to_save(model: PreTrainedModel, options: TaskOptions) -> list[str] | None:
    if options.modules_to_save != "auto":
        return names_of(options.modules_to_save or "") or None
    poolers = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "pooler"]
    weights = [weight for module in poolers for weight in module.parameters()]
    return ["pooler"] if weights and all(weight.is_floating_point() for weight in weights) else None


def lora_targets(model: PreTrainedModel, text: str) -> dict[str, Any]:
    """Returns the fields of ``LoraConfig`` for ``text``.

    ``q``, ``k``, ``v`` and ``o`` are the attention's projections if the architecture is known; parts of a packed
    projection become ``enable_lora``. ``embeddings`` is the model's input embedding, and ``all-linear`` next to other
    names every linear layer except the output head. Text with a character that no name has is a regular expression.
    """
    names = names_of(text)
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is not None and set(names) <= {*"qkvo"}:
        modules = dict(zip("qkvo", architecture.projections, strict=True))
        targets = list(dict.fromkeys(modules[name] for name in names))
        if modules["q"] == modules["k"] and {*names} & {*"qkv"}:
            return {"target_modules": targets, "enable_lora": {modules["q"]: tuple(part in names for part in "qkv")}}
        return {"target_modules": targets}
    if names == ["all-linear"] or re.search(r"[^\w., -]", text):
        return {"target_modules": text}
    layer = embeddings_of(model, "input")
    embedding = next((path for path, one in model.named_modules() if one is layer), None)
    if "embeddings" in names and embedding is None:
        names.remove("embeddings")
        print(f"{type(model).__name__} tells no input embeddings: LoRA adapts {', '.join(names)} alone")
    meant = {"embeddings": [embedding], "all-linear": linear_layers_of(model)}
    return {"target_modules": [path for name in names for path in meant.get(name, [name])]}


def checkpoint_bytes(model: PreTrainedModel) -> int:
    """Returns the bytes of the model's distinct tensors: a checkpoint's size without its header."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def choose_pooling(model: PreTrainedModel, options: Any, drawn: Collection[str]) -> None:
    """Sets what the head of BERT or RoBERTa reads: ``options.pooling``, or what the config says.

    A pooler that the checkpoint lacks becomes a part of the new head. CommandError: the model's pooling is fixed.
    """
    wanted = options.pooling if options.pooling != "default" else getattr(model.config, "classifier_pooling", None)
    if hasattr(type(model.config), "classifier_pooling"):  # as in ModernBERT, whose forward reads its config
        model.config.classifier_pooling = wanted or model.config.classifier_pooling
        return
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not architecture.keeps_first:
        if options.pooling != "default":
            raise CommandError(f"--pooling {options.pooling}: the pooling of {type(model).__name__} is fixed")
    elif wanted == "mean":
        set_pooling(model, "mean")
    elif any(name.startswith(f"{model.base_model_prefix}.pooler.") for name in drawn):
        set_pooling(model, "cls")
        print(f"{options.model} has no pooler: a new one is trained with the head (--pooling mean needs none)")


def keep_head_in_float32(model: PreTrainedModel) -> None:
    """Converts the new head, which is trained, to float32, and its inputs in every call: 16 bits lose small steps."""
    for path in {name.rpartition(".")[0] for name in head_parameters(model)}:
        model.get_submodule(path).float().register_forward_pre_hook(_in_float32)


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
