"""Locations of the modules that the paper's methods change, for models of Transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext.model.bare_model import root_module


@dataclass(frozen=True)
class Architecture:
    """Paths of modules, relative to one layer unless stated otherwise."""

    layers: str  # the list of layers, relative to the base model
    attention: str  # computes queries, keys and values
    attention_norm: str  # the norm of attention's input; "": the input is the previous layer's output
    attention_output: str  # to its output the residual stream is added
    mlp_output: str  # likewise
    layer_output: str  # its output is the layer's; "": the layer itself
    projections: tuple[str, str, str, str]  # to q, k, v (perhaps one module, concatenated) and the attention's output
    post_norm: bool = False  # whether the layer ends with a norm, which then is layer_output
    keeps_first: bool = False  # whether the first token represents the whole text, so that nothing may precede it
    position_table: str = ""  # embedding of positions, relative to the base model; "": queries and keys are rotated
    rotary: str = ""  # has the rotations' frequencies, relative to the base model; "": there are no rotations


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    attention_norm="",
    attention_output="attention.output.dropout",
    mlp_output="output.dropout",
    layer_output="output.LayerNorm",
    projections=("query", "key", "value", "attention.output.dense"),
    post_norm=True,
    keeps_first=True,
    position_table="embeddings.position_embeddings",
)
_GPT2 = Architecture(
    layers="h",
    attention="attn",
    attention_norm="ln_1",
    attention_output="attn.resid_dropout",
    mlp_output="mlp",
    layer_output="",
    projections=("c_attn", "c_attn", "c_attn", "attn.c_proj"),
    position_table="wpe",
)
_LLAMA = Architecture(
    layers="layers",
    attention="self_attn",
    attention_norm="input_layernorm",
    attention_output="self_attn",
    mlp_output="mlp",
    layer_output="",
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    rotary="rotary_emb",
)

ARCHITECTURES = {
    "bert": _BERT,
    "roberta": _BERT,  # also PhoBERT
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""Architectures by ``config.model_type``."""


def base_model(model: nn.Module) -> nn.Module:
    """Returns the model without its head: Transformers' ``base_model`` if there is one, else ``model``."""
    return getattr(root_module(model), "base_model", root_module(model))


def architecture_of(model: nn.Module, method: str) -> Architecture:
    """Returns the architecture of ``model``. TypeError: it is not supported; the message lists those that are."""
    kind, config = type(root_module(model)).__name__, getattr(root_module(model), "config", None)
    if (model_type := getattr(config, "model_type", None)) not in ARCHITECTURES:
        supported = f"supported are Transformers' models of the types {', '.join(ARCHITECTURES)}"
        raise TypeError(f"{method}: {kind} (model type {model_type!r}) is not supported; {supported}")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise TypeError(f"{method}: {kind} has cross-attention, which is not supported")
    return ARCHITECTURES[model_type]


def base_path(model: nn.Module) -> str:
    """Returns the path of :func:`base_model` in ``model``; "" for the model itself."""
    base = base_model(model)
    return next(path for path, module in root_module(model).named_modules() if module is base)


def layers_of(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """Returns ``(path in model, layer)`` from the first layer to the last."""
    path = f"{base_path(model)}.{architecture.layers}".lstrip(".")
    layers = root_module(model).get_submodule(path).named_children()
    return [(f"{path}.{name}", layer) for name, layer in layers]


def weight_of(layer: nn.Module, model: nn.Module) -> nn.Parameter:
    """Returns a floating-point weight of ``layer`` for hidden states; new modules take its device and dtype."""
    parameters = (parameter for parameter in layer.parameters() if parameter.is_floating_point())
    return next(parameter for parameter in parameters if parameter.shape[-1:] == (hidden_size(model),))


def hidden_size(model: nn.Module) -> int:
    """Returns ``d_model`` of the paper's formulas."""
    return root_module(model).config.hidden_size
