"""Reasons why rows of a model cannot choose their adapters, or some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from lora_ext._common.changes import one_at_a_time
from lora_ext.model.adapter_set import AdapterSet
from lora_ext.model.bare_model import adapter_layers, output_head, root_module
from lora_ext.nn import AdapterLayer, LoraLayer
from lora_ext.nn.adapter_layer import innermost


class Obstacles(NamedTuple):
    """Reasons why rows cannot choose: any adapter (or ""), or by name an adapter that they cannot choose.

    The name None stands for the adapters of a pool.

    Attributes:
        to_one: adapters that no row can choose.
        to_several: those that only all rows together can choose.
        to_tokens: those that rows can choose, but not tokens.
        to_media: those that act on images or sound: the path of a layer that gets a row for each image, not for each
            row of the batch.
    """

    to_all: str
    to_one: dict[str | None, str]
    to_several: dict[str | None, str]
    to_tokens: dict[str | None, str]
    to_media: dict[str | None, str]


def obstacles_of(root: nn.Module, adapters: AdapterSet) -> Obstacles:
    """Walks the model once after every change of its adapters."""
    known = adapters.active.row_obstacles
    return known[1] if known is not None and known[0] == adapters.active.changes else _found(root, adapters)


@one_at_a_time  # another thread may be adding layers
def _found(root: nn.Module, adapters: AdapterSet) -> Obstacles:
    active, changes = adapters.active, adapters.active.changes
    found, parts = Obstacles("", {}, {}, {}, {}), dict(root_module(root).named_modules())
    to_all, is_of_text = "", _modules_of_text(root)
    for path, layer in adapter_layers(root):
        if isinstance(layer, LoraLayer) and layer.is_merged and not to_all:
            names = ", ".join(map(repr, layer.merged_adapters))
            to_all = f"{names} is merged into {path!r}, so every row gets it; call unmerge(model) first"
        reasons = (
            (found.to_one, _why_no_row(path, layer)),
            (found.to_several, _why_no_mixture(path, layer, parts)),
            (found.to_tokens, _why_no_token(path, layer)),
            (found.to_media, path if is_of_text and id(layer) not in is_of_text else None),
        )
        holders = [*layer.adapters, *([None] if getattr(layer, "slots", None) is not None else [])]
        for held, reason in reasons:
            for name in holders if reason else ():
                held.setdefault(name, reason)
    for name, biases in adapters.biases.items():
        found.to_one[name] = "it trains the model's biases, which all rows share; train it with lora_bias=True instead"
        if biases.used:
            to_all = to_all or (
                f"the active adapter {name!r} has changed the model's biases for all rows; activate another one "
                "(set_adapter), or none"
            )
    active.row_obstacles = changes, found._replace(to_all=to_all)
    return active.row_obstacles[1]


def _why_no_row(path: str, layer: AdapterLayer) -> str | None:
    if not layer.rows_choose:
        return (
            f"{path!r} is a {type(layer).__name__}, which computes all rows with one adapter; call set_adapter and the "
            "model once for it"
        )
    return None


# Modules of Transformers by model and class: layers in them get [tokens, rows, features]. With as many tokens as rows,
# the shape does not tell.
_TOKENS_FIRST = {
    "xlnet.XLNetModel",
    "longformer.LongformerSelfAttention",
    "led.LEDEncoderSelfAttention",
    "fsmt.EncoderLayer",
    "fsmt.DecoderLayer",
}
# And layers in them that compute positions or prompts of one row, which the module repeats or reshapes by itself.
_OF_DEBERTA = "query_proj", "key_proj", "pos_query_proj", "pos_key_proj"
_ONCE = {
    "deberta_v2.DisentangledSelfAttention": _OF_DEBERTA,
    "sew_d.DisentangledSelfAttention": _OF_DEBERTA,
    "wav2vec2_conformer.Wav2Vec2ConformerSelfAttention": ("linear_pos",),
    "wav2vec2_bert.Wav2Vec2BertSelfAttention": ("linear_pos",),
    "seamless_m4t.SeamlessM4TConformerSelfAttention": ("linear_pos",),
    "fastspeech2_conformer.FastSpeech2ConformerAttention": ("linear_pos",),
    "gemma3n.Gemma3nAudioRelativePositionEmbedding": ("pos_proj",),
    "gemma4.Gemma4AudioAttention": ("relative_k_proj",),
    "mvp.MvpPrompt": ("prompt_embedding", "prompt_trans"),
}


# Embeddings of T5, MPNet, WavLM, W2V-BERT, Phi4, DETR and models with their code, which look up positions, or pairs of
# them, once for all rows. With as many tokens as rows, the shape does not tell.
_OF_POSITIONS = {
    "relative_attention_bias",
    "rel_attn_embed",
    "distance_embedding",
    "bias_values",
    "row_embeddings",
    "column_embeddings",
}


def _why_no_mixture(path: str, layer: AdapterLayer, parts: Mapping[str, nn.Module]) -> str | None:
    remedy = "leave it out of target_modules, or name one adapter for all rows (or call set_adapter)"
    if path.rpartition(".")[2] in _OF_POSITIONS and isinstance(innermost(layer), nn.Embedding):
        return f"{path!r} computes positions once for all rows; {remedy}"
    for name, part in _around(path, parts):
        if name.rpartition(".")[2] == "experts" and isinstance(part, nn.ModuleList | nn.ModuleDict):
            return f"{path!r} is in one of several experts, which get some of the tokens; {remedy}"
        kind = type(part)
        model = kind.__module__.removeprefix("transformers.models.").partition(".")[0]
        if (key := f"{model}.{kind.__name__}") in _TOKENS_FIRST:
            return f"{path!r} is a part of {kind.__name__}, whose layers get tokens first and rows second; {remedy}"
        if key in _ONCE and path.removeprefix(f"{name}.").partition(".")[0] in _computed_once(part, _ONCE[key]):
            return f"{path!r} computes positions or prompts once for all rows; {remedy}"
    return None


def _computed_once(part: nn.Module, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of layers in ``part`` that compute something once for all rows, of those that may."""
    if names is not _OF_DEBERTA:
        return names
    if not getattr(part, "relative_attention", False):
        return ()
    return names[:2] if part.share_att_key else names[2:]


def _why_no_token(path: str, layer: AdapterLayer) -> str | None:
    if not layer.rows_choose or layer.tokens_choose:
        return None
    base = type(innermost(layer)).__name__
    return f"{path!r} is a {base}, which may mix the tokens of a row; pass a sequence for each row"


def _around(path: str, parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules around a path and their paths, the innermost first."""
    while path:
        path = path.rpartition(".")[0]
        yield path, parts[path]


def _modules_of_text(root: nn.Module) -> set[int]:
    """The ids of the modules that a model of text and media calls with the rows of the text; empty for other models."""
    config = getattr(root, "config", None)
    decoder = root.get_decoder() if media_tokens(root) and callable(getattr(root, "get_decoder", None)) else None
    if decoder is None or decoder is root or getattr(config, "is_encoder_decoder", False):
        return set()
    head = output_head(root)
    heads = (module for module in root.modules() if isinstance(module, AdapterLayer) and innermost(module) is head)
    return {id(module) for module in (*decoder.modules(), *heads)}


def media_tokens(root: nn.Module) -> dict[str, int]:
    """The tokens that stand for parts of media in the text, by the option of the model's config."""
    config = getattr(root, "config", None)
    options = ("image_token_id", "video_token_id", "audio_token_id")
    found = {option: getattr(config, option, None) for option in options}
    return {option: token for option, token in found.items() if type(token) is int}
