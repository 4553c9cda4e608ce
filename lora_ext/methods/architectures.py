"""Where the layers of Transformers' models have what the methods of the paper change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lora_ext.injection.bare_model import root_module


@dataclass(frozen=True)
class Architecture:
    """Paths of modules: of the list of layers in the base model, all others in one layer.

    Attributes:
        layers: the list.
        attention: computes queries, keys and values.
        attention_norm: what attention's input was normalised by; "": it is the previous layer's output as it is.
        attention_output, mlp_output: their outputs are what the residual stream is added to.
        layer_output: its output is the layer's; "": the layer itself.
        post_norm: whether the layer ends with a normalisation, which is ``layer_output``.
        projections: computing queries, keys, values, and the attention's output; the first three may be one,
            which returns them side by side.
        keeps_first: whether the first token stands for the whole text, so that nothing may be put in front of it.
        position_table: in the base model, the embedding of positions; "": they are rotations of queries and keys.
        rotary: in the base model, what has the frequencies of those rotations; "": there are none.
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
    "roberta": _BERT,  # PhoBERT, too
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
"""By ``config.model_type``."""


def base_model(model: nn.Module) -> nn.Module:
    """The model without its head: Transformers' ``base_model``, or ``model`` where there is none."""
    return getattr(root_module(model), "base_model", root_module(model))


def architecture_of(model: nn.Module, method: str) -> Architecture:
    """What ``model`` is. TypeError: nothing that ``method`` knows; the message lists what it does."""
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
    """Where :func:`base_model` is in ``model``; "": it is the model itself."""
    base = base_model(model)
    return next(path for path, module in root_module(model).named_modules() if module is base)


def layers_of(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.Module]]:
    """``(path in model, layer)`` from the first to the last."""
    path = f"{base_path(model)}.{architecture.layers}".lstrip(".")
    layers = root_module(model).get_submodule(path).named_children()
    return [(f"{path}.{name}", layer) for name, layer in layers]


def weight_of(layer: nn.Module, model: nn.Module) -> nn.Parameter:
    """One of ``layer`` that reads or makes hidden states, whose device and dtype new modules take; no integers."""
    parameters = (each for each in layer.parameters() if each.is_floating_point())
    return next(each for each in parameters if each.shape[-1:] == (hidden_size(model),))


def hidden_size(model: nn.Module) -> int:
    """``d_model`` of the paper's formulas."""
    return root_module(model).config.hidden_size
