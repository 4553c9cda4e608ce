"""The fine-tuned models, one copy for each contestant: the same weights, the same initial factors."""

from __future__ import annotations

import copy
import importlib.util
import sys

import torch
from torch import nn

import lora_ext
from harness.contestants import ACCELERATED, ALPHA_OVER_R, FROZEN, LORA_EXT
from lora_ext.injection.inject import lora_modules

HEAD_ONLY = "head only"  # no gradient passes through the frozen model: faster than any adapter can be
LLAMA_VOCABULARY = 8192
HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def bert(
    dtype: torch.dtype, dropout: float, layers: int = 4, width: int = 768, labels: int = 3, vocabulary: int = 30522
) -> nn.Module:
    """A BERT with BERT-base's widths and random weights, a sequence classifier."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        intermediate_size=4 * width,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config).to(dtype)


def llama(dtype: torch.dtype, layers: int = 4, width: int = 1024) -> nn.Module:
    """A Llama with random weights for causal language modelling; its MLP is 2.75 times as wide, as in Llama-2-7B.

    The output head is 15 % of the products, between those of Llama-3.2-1B (21 %) and Llama-3-8B (7 %).
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 64, 1),
        num_key_value_heads=max(width // 256, 1),
        use_cache=False,
    )
    return LlamaForCausalLM(config).to(dtype)


def nf4(model: nn.Module) -> nn.Module:
    """Quantises the linear layers of ``model`` except the classifier, in place: NF4 with double quantisation, as QLoRA.

    Products are computed in the dtype of the model.
    """
    import bitsandbytes

    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and path != "classifier":
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, compute_dtype=module.weight.dtype, quant_type="nf4"
            ).to(module.weight.dtype)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(path, layer.to(module.weight.device))
    model.is_loaded_in_4bit = True  # PEFT asks for it
    return model


def pretrained(path: str, dropout: float, labels: int) -> nn.Module:
    """A sequence classifier from a directory, with a new head."""
    from transformers import AutoModelForSequenceClassification, logging

    logging.set_verbosity_error()  # no warning about the new head
    logging.disable_progress_bar()
    dropouts = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels, dtype=torch.float32, **dropouts)


def adapted(model: nn.Module, rank: int, dropout: float, factors: torch.dtype | None = None) -> dict[str, nn.Module]:
    """Returns copies of ``model`` in training mode; those of a classifier train its head along with the adapters.

    "head only"; "frozen", whose backward still passes through the model to its embeddings, the least that adapters in
    the first layer need; and a copy for each contestant with adapters on every other linear layer ("peft accelerated":
    PEFT's model on our ops), with the same factors.
    factors: their dtype; None: the contestants' choice (float32 for a 16-bit model).
    """
    options = {"r": rank, "lora_alpha": ALPHA_OVER_R * rank, "lora_dropout": dropout}
    classifies = hasattr(model, "classifier")
    options |= {"target_modules": "all-linear", "task_type": "SEQ_CLS" if classifies else "CAUSAL_LM"}
    models = {HEAD_ONLY: copy.deepcopy(model), FROZEN: copy.deepcopy(model)}
    for frozen in models.values():
        frozen.requires_grad_(False)
    for frozen in models.values() if classifies else [models[HEAD_ONLY]]:
        (frozen.classifier if classifies else frozen.get_output_embeddings()).requires_grad_(True)
    # The same as enable_input_require_grads(), without its warning in recent releases.
    models[FROZEN].get_input_embeddings().register_forward_hook(lambda _module, _inputs, y: y.requires_grad_())
    ours = lora_ext.inject(copy.deepcopy(model), lora_ext.LoraConfig(**options))
    models[LORA_EXT] = ours
    if HAS_PEFT:
        import peft

        models["peft"] = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options))
        copy_factors(ours, models["peft"])
        from lora_ext.integrations.peft import accelerate

        models[ACCELERATED] = accelerate(copy.deepcopy(models["peft"]))
    for adapted_model in models.values():
        for name, parameter in adapted_model.named_parameters():
            if factors and "lora_" in name:
                parameter.data = parameter.data.to(factors)
        adapted_model.train()
    return models


def copy_factors(ours: nn.Module, theirs: nn.Module) -> None:
    """Copies ``ours``' factors to ``theirs``. SystemExit: they adapt different layers, so times are not comparable."""
    layers = {path: layer.adapters.default for path, layer in lora_modules(ours)}
    peers = {
        name.removeprefix("base_model.model."): module
        for name, module in theirs.named_modules()
        if hasattr(module, "lora_A")
    }
    if layers.keys() != peers.keys():
        sys.exit(f"lora_ext and peft adapt different layers: {sorted(layers.keys() ^ peers.keys())}: not timed")
    with torch.no_grad():
        for path, adapter in layers.items():
            peers[path].lora_A.default.weight.copy_(adapter.lora_A)
            peers[path].lora_B.default.weight.copy_(adapter.lora_B)
