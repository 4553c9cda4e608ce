"""Builds models to plan for on the meta device, from a config alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from lora_ext.methods import Method, apply_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import demo
from lora_ext.tasks.shared.hub import check_no_adapter, loading_options, why_not_loaded

TASKS = {"classification": AutoModelForSequenceClassification, "causal-lm": AutoModelForCausalLM}
DEMO_LABELS = 3


def gpt3_175b() -> PretrainedConfig:
    """GPT-3 175B (Brown et al. 2020, arXiv 2005.14165, table 2.1) with GPT-2's vocabulary, which it reportedly uses.

    Attention is dense in every layer; the original's is sparse in every second one, which changes no weight.
    """
    return GPT2Config(
        n_layer=96,
        n_embd=12288,
        n_head=96,
        n_positions=2048,
        vocab_size=50257,
        architectures=["GPT2LMHeadModel"],
    )


def llama3(layers: int, hidden: int, inner: int, heads: int) -> PretrainedConfig:
    """Llama 3 (arXiv 2407.21783, table 3) with the vocabulary of the published weights."""
    return LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        architectures=["LlamaForCausalLM"],
    )


BUILT_IN: dict[str, Callable[[], PretrainedConfig]] = {
    "gpt3-175b": gpt3_175b,
    "llama3-8b": partial(llama3, 32, 4096, 14336, 32),
    "llama3-70b": partial(llama3, 80, 8192, 28672, 64),
    "llama3-405b": partial(llama3, 126, 16384, 53248, 128),
}


def read_config(model: str | None) -> PretrainedConfig:
    """Reads the config of ``model``: built in, a file, a directory or a hub id; None is the demo model.

    TaskError: there is no such config, or it is incomplete.
    """
    if model in BUILT_IN:
        return BUILT_IN[model]()
    path = demo.model_path() if model is None else model
    check_no_adapter(str(path))
    try:
        config = AutoConfig.from_pretrained(path, **loading_options(str(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        built_in = "" if Path(path).exists() else f"; built-in models: {', '.join(BUILT_IN)}"
        raise TaskError(
            f"--model {model}: no config that transformers knows: {why_not_loaded(str(path), error).strip()}{built_in}"
        ) from error
    if model is None:
        config.num_labels = DEMO_LABELS
    return config


def task_of(config: PretrainedConfig) -> str:
    """Returns ``causal-lm`` if the config names one, otherwise ``classification``, which finetune trains."""
    names = config.architectures or ()
    is_language_model = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    return "causal-lm" if is_language_model else "classification"


class ConfigSource:
    """A :class:`lora_ext.planner.Source`.

    Args:
        config: the bare model's config.
        task: one of :data:`TASKS`.
        attention: transformers' name of the attention implementation; None: its default.
        method_for: returns the method that adapts a model; None: the model is frozen.

    Raises:
        TaskError: transformers has no model of this kind for the task.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        task: str,
        attention: str | None,
        method_for: Callable[[PreTrainedModel], Method] | None,
    ) -> None:
        self.task, self.attention, self.method_for = task, attention, method_for
        self.config = copy.deepcopy(config)
        self.config.use_cache = False  # as the Trainer sets it
        if self.config.pad_token_id is None:  # a classifier needs one
            self.config.pad_token_id = 0
        if type(config) not in TASKS[task]._model_mapping:
            raise TaskError(f"transformers has no model of the type {config.model_type!r} for --task {task}")

    @property
    def num_layers(self) -> int | None:
        """Number of layers; None if the config does not allow fewer."""
        kinds = set(getattr(self.config, "layer_types", None) or [None])
        if self.config.is_encoder_decoder or len(kinds) > 1:
            return None
        return getattr(self.config, "num_hidden_layers", None)

    @property
    def can_checkpoint(self) -> bool:
        return TASKS[self.task]._model_mapping[type(self.config)].supports_gradient_checkpointing

    def model(
        self, dtype: torch.dtype, num_layers: int | None = None, gradient_checkpointing: bool = False
    ) -> PreTrainedModel:
        config = copy.deepcopy(self.config)
        if num_layers is not None:
            config.num_hidden_layers = num_layers
        with torch.device("meta"):
            model = TASKS[self.task].from_config(config, dtype=dtype, attn_implementation=self.attention)
        model.train()
        if self.method_for is None:
            model.requires_grad_(False)
        else:
            apply_method(model, self.method_for(model))
        if gradient_checkpointing:
            if not self.can_checkpoint:
                raise ValueError(f"{type(model).__name__} does not support gradient checkpointing; leave it out")
            # Real training also keeps the random generator's state, 5 KB a layer; the meta device has none.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "preserve_rng_state": False})
        return model

    def loss(self, model: PreTrainedModel, batch_size: int, seq_len: int) -> Tensor:
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
        labels = ids if self.task == "causal-lm" else ids[:, 0]
        return model(input_ids=ids, labels=labels).loss

    def outputs(self, model: PreTrainedModel, batch_size: int, seq_len: int) -> Tensor:
        return model(input_ids=torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")).logits
