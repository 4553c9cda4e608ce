"""Locations of the modules that the paper's methods change, for models of Transformers."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext.model.bare_model import root_module


@dataclass(frozen=True)
class Architecture:
    """Paths of modules, relative to one layer unless stated otherwise.

    Attributes:
        layers: the list of layers, relative to the base model.
        attention: the module that computes queries, keys and values.
        attention_norm: the norm of attention's input; "": the input is the previous layer's output.
        attention_output, mlp_output: modules to whose outputs the residual stream is added.
        layer_output: the module whose output is the layer's; "": the layer itself.
        post_norm: whether the layer ends with a norm, which then is ``layer_output``.
        projections: to queries, keys, values and the attention's output; the first three may be one module that
            returns them concatenated.
        keeps_first: whether the first token represents the whole text, so that nothing may precede it.
        position_table: the embedding of positions, relative to the base model; "": queries and keys are rotated.
        rotary: the module with the rotations' frequencies, relative to the base model; "": there are no rotations.
    """

    layers: str
    attention: str
    attention_norm: str
    attention_output: str
    mlp_output: str
    layer_output: str
    post_norm: bool
    projections: tuple[str, str, str, str]
    keeps_first: bool
    position_table: str = ""
    rotary: str = ""


_BERT = Architecture(
    layers="encoder.layer",
    attention="attention.self",
    attention_norm="",
    attention_output="attention.output.dropout",
    mlp_output="output.dropout",
    layer_output="output.LayerNorm",
    post_norm=True,
    projections=("query", "key", "value", "attention.output.dense"),
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
    post_norm=False,
    projections=("c_attn", "c_attn", "c_attn", "attn.c_proj"),
    keeps_first=False,
    position_table="wpe",
)
_LLAMA = Architecture(
    layers="layers",
    attention="self_attn",
    attention_norm="input_layernorm",
    attention_output="self_attn",
    mlp_output="mlp",
    layer_output="",
    post_norm=False,
    projections=("q_proj", "k_proj", "v_proj", "o_proj"),
    keeps_first=False,
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
    model_type = getattr(getattr(root_module(model), "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise TypeError(
            f"{method}: {type(root_module(model)).__name__} (model type {model_type!r}) is not supported; supported "
            f"are Transformers' models of the types {', '.join(ARCHITECTURES)}"
        )
    if getattr(model.config, "is_encoder_decoder", False) or getattr(model.config, "add_cross_attention", False):
        raise TypeError(f"{method}: {type(root_module(model)).__name__} has cross-attention, which is not supported")
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
