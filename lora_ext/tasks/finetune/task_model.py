"""Loads, checks and adapts the model of a fine-tuning run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    logging,
)

from lora_ext._common.embeddings import input_embeddings
from lora_ext._common.progress import is_terminal
from lora_ext.adapters import merge_and_unload
from lora_ext.methods import (
    ARCHITECTURES,
    Method,
    apply_method,
    head_parameters,
    load_method,
    new_method,
    option_names,
)
from lora_ext.methods.prefix_embed import SpecialTokens
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import demo
from lora_ext.tasks.finetune.data import Splits
from lora_ext.tasks.finetune.defaults import USUAL, WITH_EMBEDDINGS
from lora_ext.tasks.finetune.lora_targets import lora_targets, split_names
from lora_ext.tasks.finetune.pooling import choose_pooling, poolers
from lora_ext.tasks.finetune.quantize import (
    QUANTIZABLE,
    Quantization,
    quantization_of,
    tame_bitsandbytes,
    tensors_of_8bit,
)
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_data import load_data
from lora_ext.tasks.shared.hub import check_no_adapter, loading_options, why_not_loaded


class TaskModel(NamedTuple):
    """A bare model, its path and its tokenizer."""

    path: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    drawn: tuple[str, ...]  # parameters without values in the checkpoint, except those of the new head


def model_path_of(model: str | None) -> str:
    """Returns a local directory as an absolute path, because the adapter's config names its base model by it."""
    if model is None:
        return str(demo.model_path())
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def load_task_model(settings: Settings) -> tuple[TaskModel, Splits]:
    """Loads the bare model and the texts that ``settings`` name. TaskError: one cannot be loaded."""
    splits = load_data(settings, say=lambda line: None)
    path, quantization = model_path_of(settings.model), quantization_of(settings)
    model = load_model(path, splits.labels, settings.max_length, settings.dtype, quantization, settings.pooling)
    return model, splits


def load_model(
    path: str,
    labels: list[str],
    max_length: int,
    dtype: str = "float32",
    quantization: Quantization | None = None,
    pooling: str | None = None,
) -> TaskModel:
    """Loads a classifier of ``labels``, in ``dtype`` except the new head, which is float32.

    TaskError: ``path`` has none, or it takes fewer tokens than ``max_length``.
    """
    check_no_adapter(path)
    logging.set_verbosity_error()  # transformers reports every new head; check_fits reports other missing weights
    if not is_terminal():
        logging.disable_progress_bar()
    try:
        options = loading_options(path)
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        kind, how = AutoModelForSequenceClassification, {}
        if quantization is not None:
            how = quantization.options(path, kind, options, num_labels=len(labels))
        model, loaded = kind.from_pretrained(
            path,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
            problem_type="single_label_classification",  # overrides the checkpoint's
            ignore_mismatched_sizes=True,  # the checkpoint's head can be for other labels
            output_loading_info=True,
            dtype=getattr(torch, dtype),
            **options,
            **how,
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise TaskError(f"--model {path} cannot be loaded: {why_not_loaded(path, error)}") from error
    if max_length > tokenizer.model_max_length:
        raise TaskError(f"--max-length is {max_length}, but {path} takes at most {tokenizer.model_max_length} tokens")
    if tokenizer.pad_token is None:  # language models have none
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tame_bitsandbytes(model)
    choose_pooling(model, path, pooling, loaded["missing_keys"])
    head = head_parameters(model).keys()
    if wrong := sorted({name for name, *_ in loaded["mismatched_keys"]} - head):
        raise TaskError(f"--model {path}: {wrong[0]} has another shape than its config.json says")
    if dtype != "float32":
        _keep_head_in_float32(model)
    drawn = {name for name, _ in model.named_parameters() if name in loaded["missing_keys"]} - head
    return TaskModel(path, tokenizer, model, tuple(sorted(drawn)))


def _keep_head_in_float32(model: PreTrainedModel) -> None:
    """Converts the new head, which is trained, to float32, and its inputs in every call: 16 bits lose small steps."""
    for path in {name.rpartition(".")[0] for name in head_parameters(model)}:
        model.get_submodule(path).float().register_forward_pre_hook(_in_float32)


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)


def sharing(model: PreTrainedModel) -> PreTrainedModel:
    """Copies ``model`` but shares its parameters, which takes almost no memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *tensors_of_8bit(model))})


def merged_with(base: PreTrainedModel, adapter: Path, say: Callable[[str], None]) -> PreTrainedModel | None:
    """Merges the saved adapter into a copy of ``base``, with dequantised weights.

    Returns None, and shows the reason with ``say``, if it cannot be merged.
    """
    try:
        adapted = load_method(copy.deepcopy(base), adapter)
        return merge_and_unload(adapted, dequantize=getattr(base, "is_quantized", False))
    except ValueError as error:  # training diverged to non-finite values
        say(f"the adapter cannot be merged: {error}")
        return None


def adapt(model: PreTrainedModel, settings: Settings, model_path: str) -> PreTrainedModel:
    """Applies the method of ``settings`` to ``model`` in place, with gradient checkpointing if wanted; returns it.

    TaskError: the method does not fit the model, or an option is wrong.
    """
    check_checkpointing(model, settings)
    if getattr(model, "is_quantized", False) and not {*settings.method.split("+")} <= {*QUANTIZABLE}:
        raise TaskError(
            f"--method {settings.method} trains the weights, and those of {model_path} are quantised; choose one of "
            f"{', '.join(QUANTIZABLE)}, or name a checkpoint that is not quantised"
        )
    try:
        apply_method(model, method_for(model, settings, model_path))
    except (ValueError, TypeError) as error:
        raise TaskError(f"--method {settings.method}: {error}") from error
    if settings.gradient_checkpointing != "no":
        # Earlier releases of Transformers have the second name only.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": settings.gradient_checkpointing == "reentrant"})
        if not hasattr(model, "_require_grads_hook"):  # a reentrant layer needs an input that requires a gradient
            model.enable_input_require_grads()
    return model


def check_checkpointing(model: PreTrainedModel, settings: Settings) -> None:
    """Raises TaskError if ``settings`` want gradient checkpointing, which the model's class does not support."""
    if settings.gradient_checkpointing != "no" and not model.supports_gradient_checkpointing:
        raise TaskError(f"--gradient-checkpointing: {type(model).__name__} does not support it; leave it out")


def check_fits(task_model: TaskModel, settings: Settings) -> None:
    """Raises TaskError if weights missing from the checkpoint would be neither trained nor saved."""
    if settings.method == "full":
        return
    names = tuple(_modules_to_save(task_model.model, settings) or ())
    saved = tuple(f"{path}." for path, _ in task_model.model.named_modules() if path.endswith(names))
    if missing := sorted({name.rpartition(".")[0] for name in task_model.drawn if not name.startswith(saved)}):
        raise TaskError(
            f"--method {settings.method}: {task_model.path} has no values for {', '.join(missing)}, which would stay "
            f"random and be in no file; train them, too: --method lora --modules-to-save {','.join(missing)}, "
            "or --method full"
        )


def _modules_to_save(model: PreTrainedModel, settings: Settings) -> list[str] | None:
    if settings.modules_to_save == "auto":
        return poolers(model)
    return split_names(settings.modules_to_save) if settings.modules_to_save else None


def targets_of(model: PreTrainedModel, settings: Settings) -> str:
    """Returns the target modules of ``settings``; of the defaults, those that ``model`` has."""
    is_default = (settings.target_modules, settings.modules_to_save) == tuple(
        WITH_EMBEDDINGS[name] for name in ("target_modules", "modules_to_save")
    )
    if is_default and input_embeddings(model) is None:
        return USUAL["target_modules"]
    return settings.target_modules


def method_for(model: PreTrainedModel, settings: Settings, model_path: str) -> Method:
    """Returns the method that ``settings`` ask for. ValueError, TypeError: an option is wrong."""
    values = asdict(settings) | {
        **lora_targets(model, targets_of(model, settings)),
        "modules_to_save": _modules_to_save(model, settings),
        "base_model_name_or_path": model_path,
    }
    options = {option for name in settings.method.split("+") for option in option_names(name)}
    return new_method(settings.method, **{key: value for key, value in values.items() if key in options})


def check_room(modules: Iterable[nn.Module], most: int | None, rows: list[dict[str, Any]]) -> None:
    """Raises TaskError if the longest text has more tokens than the model has positions.

    Args:
        modules: the modules of the adapted model, or those that will be put into it.
        most: the bare model's limit, from :func:`most_tokens`.
        rows: all texts, encoded.
    """
    longest = max(len(row["input_ids"]) for row in rows)
    for module in modules:
        if isinstance(module, SpecialTokens) and module.most_tokens is not None and longest > module.most_tokens:
            raise TaskError(
                f"a text has {longest} tokens, but the model has {module.max_positions} positions and prefix-embed "
                f"takes {module.special_tokens} of them; want --max-length {module.most_tokens}, "
                "or fewer special tokens"
            )
    if most is not None and longest > most:
        raise TaskError(f"a text has {longest} tokens, but the model has {most} positions; want --max-length {most}")


def check_tokens(model: PreTrainedModel, rows: Iterable[dict[str, Any]], path: str) -> None:
    """Raises TaskError if a text has a token that the embedding of the bare ``model`` lacks."""
    if (embedding := input_embeddings(model)) is None:  # CANINE hashes characters
        return
    known = embedding.weight.shape[0]
    largest = max(max(row["input_ids"]) for row in rows)
    if largest >= known:
        raise TaskError(
            f"--model {path}: its tokenizer gives the token {largest}, but the model has {known} tokens; the tokenizer "
            "belongs to another model"
        )


def most_tokens(model: PreTrainedModel) -> int | None:
    """Returns the maximum number of tokens in a text; None if the config does not say."""
    architecture = ARCHITECTURES.get(model.config.model_type)
    if architecture is None or not architecture.position_table:
        most = getattr(model.config, "max_position_embeddings", None)
        has_positions = getattr(model.config, "position_biased_input", True)  # DeBERTa can have relative ones only
        return most if has_positions and isinstance(most, int) and most > 0 else None  # XLNet's is -1
    table = model.base_model.get_submodule(architecture.position_table)
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
