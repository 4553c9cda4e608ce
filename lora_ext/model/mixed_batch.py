"""Mixed batches: ``model(..., adapter_names=[...])`` and ``model.generate(..., adapter_names=[...])``.

A hook before the model's forward takes the names out of the arguments, as most models would swallow them in their
``**kwargs``, checks everything before the model runs, and makes the choice current for the layers
(lora_ext/nn/rows.py). A hook after it ends the choice.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._common.changes import one_at_a_time
from lora_ext._common.hooks import has_pre_hook, remove_hooks
from lora_ext._common.printable import shown
from lora_ext.model.adapter_set import AdapterSet, adapter_set
from lora_ext.model.bare_model import adapter_layers, output_head, root_module
from lora_ext.model.replaced_method import ReplacedMethod
from lora_ext.nn import AdapterLayer
from lora_ext.nn.adapter_layer import innermost
from lora_ext.nn.rows import BASE, RowChoice, choosing, chosen, enter, leave

NAMES = "adapter_names"
_METHODS = "generate", "generate_batch"


# --- into a model and out of it ---------------------------------------------------------------------------------------


def serve_adapter_names(root: nn.Module, adapters: AdapterSet, parts: Iterable[nn.Module]) -> None:
    """Makes ``root`` take ``adapter_names``, unless its forward has a parameter of that name.

    ``parts`` of it refuse them, as their forwards would swallow them in ``**kwargs``.
    """
    if NAMES in inspect.signature(root.forward).parameters:
        return
    for module in (root, *parts):
        if not has_pre_hook(module, take_adapter_names):
            module.register_forward_pre_hook(take_adapter_names, with_kwargs=True)
    if end_call not in root._forward_hooks.values():
        root.register_forward_hook(end_call, always_call=True)
        for name in _METHODS:
            MethodWithNames.put(name, root, adapters)


def forget_adapter_names(module: nn.Module) -> None:
    """Undoes :func:`serve_adapter_names`."""
    remove_hooks(module, take_adapter_names, end_call)
    for name in _METHODS:
        MethodWithNames.restore(name, module)


# --- calls ------------------------------------------------------------------------------------------------------------


def take_adapter_names(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple | None:
    """Takes ``adapter_names`` out of the arguments and makes the choice current; a hook before the forward."""
    adapters = adapter_set(module)
    rest, names = kwargs, kwargs.get(NAMES)
    if adapters is None:
        if names is not None:
            raise ValueError(
                f"{type(module).__name__}: {NAMES} is for calls of the injected model, and this is a part of it, which "
                "would ignore it; call that model"
            )
        return None
    if NAMES in kwargs:
        rest = {key: value for key, value in kwargs.items() if key != NAMES}
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if names is not None or adapters.active.mixed_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_compiled

            refuse_compiled()
    else:
        drop_interrupted(adapters)
        caller, outer = type(module).__name__, chosen(adapters.active)
        if names is not None:
            if "adapter_lengths" in rest:
                raise ValueError(f"{caller}: there is no adapter_lengths; pass a sequence, and a name, for each row")
            enter(choice_of(module, adapters, names, _by_name(args, rest), caller))
        elif outer is not None:  # a step of generate
            _note_rows(module, outer, _by_name(args, rest), caller)
    return None if rest is kwargs else (args, rest)


def end_call(module: nn.Module, args: Any, output: Any) -> None:
    """Ends the choice that the call began; a hook after the forward, which also runs after an error."""
    if torch.compiler.is_compiling():
        return
    choice = chosen(adapter_set(module).active)
    if choice is not None and choice.repeats is None:
        leave(choice, output)


def drop_interrupted(adapters: AdapterSet) -> None:
    """Ends a call that Ctrl-C left without running its hook: another one begins, and no model calls itself."""
    choice = chosen(adapters.active)
    if choice is not None and choice.repeats is None:
        leave(choice)


class MethodWithNames(ReplacedMethod):
    """The ``generate`` or ``generate_batch`` of an injected model.

    ``generate`` takes a name for each prompt, also for all its beams or returned sequences. ``generate_batch`` refuses
    names: Transformers' would ignore them.
    """

    def __init__(self, name: str, model: nn.Module, adapters: AdapterSet) -> None:
        super().__init__(name, model)
        self.adapters = adapters

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        drop_interrupted(self.adapters)
        if adapter_names is None:
            return self.original(*args, **kwargs)
        caller = f"{type(self.module).__name__}.{self.name}"
        if self.name != "generate":
            raise ValueError(
                f"{caller}: {NAMES} is for calls of the model and generate; servers with continuous batching, such as "
                "vLLM and SGLang, read the files of save_adapter"
            )
        values = _by_name(args, kwargs)
        choice = choice_of(self.module, self.adapters, adapter_names, values, caller)
        config = values.get("generation_config") or getattr(self.module, "generation_config", None)
        counts = [values.get(key, getattr(config, key, None)) for key in ("num_beams", "num_return_sequences")]
        choice.repeats = frozenset({1, *(count for count in counts if isinstance(count, int))})
        choice.multiples |= choice.repeats  # generate also calls parts of the model, whose calls are not counted
        with choosing(choice):
            return self.original(*args, **kwargs)


# --- the choice of a call ---------------------------------------------------------------------------------------------


def choice_of(
    root: nn.Module, adapters: AdapterSet, names: object, values: Mapping[str, Any], caller: str
) -> RowChoice:
    """Returns the choice of ``names`` for a call with the arguments ``values``.

    Raises:
        TypeError: ``names`` is no list of strings.
        KeyError: there is no such adapter; the message lists them.
        ValueError: the batch has another number of rows; or its rows cannot choose: one of the adapters has a part that
            is the same for all rows, a layer gets something else than rows, or a pool's adapters would train. The
            message has the remedy.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{caller}: {NAMES} is {shown(names)}, want a list with a name per row; {BASE!r} is none")
    if not names:
        raise ValueError(f"{caller}: {NAMES} is empty, want a name for each row")
    used = dict.fromkeys(name for name in names if name != BASE)
    pooled = () if adapters.pool is None else tuple(name for name in used if name not in adapters.configs)
    if pooled:
        adapters.pool.check_known(pooled, caller, adapters.configs)
    else:
        adapters.check_names(caller, used)
    first = _first_rows(root, values)
    if first is not None and len(first[1]) != len(names):
        raise ValueError(
            f"{caller}: {NAMES} has {len(names)} names, but {first[0]} has {len(first[1])} rows; pass a name for each "
            "row"
        )
    is_uniform = len(set(names)) == 1
    _check_supported(root, adapters, used, values, caller, is_uniform)
    if pooled and root.training and torch.is_grad_enabled():
        raise ValueError(
            f"{caller}: {NAMES}: {pooled[0]!r} is in a pool, whose adapters do not train; call model.eval(), or "
            "load_adapter(model, directory, trainable=True)"
        )
    if adapters.active.is_disabled:
        names, pooled = [BASE] * len(names), ()
    choice = RowChoice(names, adapters.active)
    choice.is_uniform = is_uniform
    choice.pool, choice.pool_names = adapters.pool, pooled
    _note_rows(root, choice, values, caller)
    return choice


def _note_rows(root: nn.Module, choice: RowChoice, values: Mapping[str, Any], caller: str) -> None:
    """Notes how many rows of a layer's input may belong to one name: its row of the batch, or all tokens of that.

    ValueError: a step of generate has rows that belong to no name, or in another order.
    """
    first = _first_rows(root, values)
    if first is None or choice.is_uniform:
        return
    rows = len(first[1])
    times, rest = divmod(rows, len(choice.rows))
    if rest or times not in (choice.repeats or (1,)):
        raise ValueError(
            f"{caller}: {NAMES} has {len(choice.rows)} names, but {first[0]} has {rows} rows in a step of generate, "
            "which are no beams or returned sequences of each prompt (guidance puts all prompts into a batch twice, "
            "some models leave out rows that are done); call generate once for each adapter (set_adapter)"
        )
    lengths = {tensor.shape[1] for _, tensor in _tensors(values) if tensor.dim() > 1 and len(tensor) == rows}
    choice.multiples = frozenset((1, times, *(times * length for length in lengths))) | (choice.repeats or set())


def _by_name(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {f"argument {i}": value for i, value in enumerate(args, start=1)} | dict(kwargs)


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.dim():
                yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors(value)


def _first_rows(root: nn.Module, values: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """Returns the name and the value of the argument that says how many rows a batch has, or None."""
    tensors = dict(_tensors(values))
    main = getattr(root, "main_input_name", None)
    for name in (main, "input_ids", "decoder_input_ids", "inputs_embeds", "sample", "hidden_states", *tensors):
        if name in tensors:
            return name, tensors[name]
    return None


# --- what rows cannot choose ------------------------------------------------------------------------------------------


def _check_supported(
    root: nn.Module, adapters: AdapterSet, used: Iterable[str], values: Mapping[str, Any], caller: str, is_uniform: bool
) -> None:
    """Checks that rows can choose the adapters ``used``. ValueError: they cannot; the message has the remedy."""
    for name, biases in adapters.biases.items():
        if biases.used:
            raise ValueError(
                f"{caller}: {NAMES}: the active adapter {name!r} has changed the model's biases for all rows; activate "
                "another one (set_adapter), or none"
            )
    found = _reasons(root, adapters)
    kinds = [_ALWAYS] if is_uniform else [_ALWAYS, _IF_SEVERAL]
    kinds += [_WITH_MEDIA] * (not is_uniform and any(name.startswith(_MEDIA) for name, _ in _tensors(values)))
    for name in used:
        key = name if name in adapters.configs else None
        if (reason := next((found[kind, key] for kind in kinds if (kind, key) in found), None)) is not None:
            raise ValueError(
                f"{caller}: {NAMES}: {name!r} cannot be chosen by a row: {reason}; leave that out of the adapter, or "
                "call the model once for it (set_adapter)"
            )


# When a reason holds: for any names, if they differ, or if they differ next to images or sounds.
_ALWAYS, _IF_SEVERAL, _WITH_MEDIA = range(3)
Reasons = dict[tuple[int, str | None], str]


def _reasons(root: nn.Module, adapters: AdapterSet) -> Reasons:
    """Returns why rows cannot choose, by when and by adapter (None: those of a pool).

    Walks the model once after every change of its adapters.
    """
    known = adapters.active.unsupported_rows
    return known[1] if known is not None and known[0] == adapters.active.changes else _found(root, adapters)


@one_at_a_time  # another thread may be adding layers
def _found(root: nn.Module, adapters: AdapterSet) -> Reasons:
    found: Reasons = {}
    parts, of_text = dict(root_module(root).named_modules()), _modules_of_text(root)
    for path, layer in adapter_layers(root):
        reasons = (
            "" if layer.rows_choose else "computes all rows with one adapter",
            _why_same_for_all(path, layer, parts),
            "computes images or sounds" if of_text and id(layer) not in of_text else "",
        )
        for name in (*layer.adapters, *([] if getattr(layer, "slots", None) is None else [None])):
            for kind, reason in enumerate(reasons):
                if reason:
                    found.setdefault((kind, name), f"{path!r} ({type(layer).__name__}) {reason}")
    for name in adapters.biases:
        found[_ALWAYS, name] = "it trains the model's biases, which all rows share (lora_bias=True trains its own)"
    adapters.active.unsupported_rows = adapters.active.changes, found
    return found


# Layers of these models of Transformers get [tokens, rows, features]. With as many tokens as rows, nothing would tell.
_TOKENS_FIRST = {"xlnet", "longformer", "led", "fsmt"}
# Embeddings of T5, MPNet, WavLM, W2V-BERT, Phi4, DETR and models with their code, which look up positions, or pairs of
# them, once for all rows: the same.
_OF_POSITIONS = {
    *("relative_attention_bias", "rel_attn_embed", "distance_embedding"),
    *("bias_values", "row_embeddings", "column_embeddings"),
}


def _why_same_for_all(path: str, layer: AdapterLayer, parts: Mapping[str, nn.Module]) -> str:
    """Returns why a layer's input may look as if it had a row for each name, though it has none, or ""."""
    if path.rpartition(".")[2] in _OF_POSITIONS and isinstance(innermost(layer), nn.Embedding):
        return "computes positions once for all rows"
    around = path
    while around := around.rpartition(".")[0]:
        part = parts[around]
        if around.rpartition(".")[2] == "experts" and isinstance(part, nn.ModuleList | nn.ModuleDict):
            return "is in one of several experts, which get some of the tokens"
        if type(part).__module__.removeprefix("transformers.models.").partition(".")[0] in _TOKENS_FIRST:
            return f"is a part of {type(part).__name__}, whose layers get tokens first"
    return ""


_MEDIA = "pixel_values", "image_pixel_values", "input_features", "input_values", "audio"
_MEDIA_TOKENS = "image_token_id", "video_token_id", "audio_token_id"


def _modules_of_text(root: nn.Module) -> set[int]:
    """The ids of the modules that a model of text and media calls with the rows of the text; empty for other models.

    Others compute the images or sounds of all rows in one batch, so that nothing tells to which name they belong.
    """
    config, get_decoder = getattr(root, "config", None), getattr(root, "get_decoder", None)
    has_media = any(type(getattr(config, option, None)) is int for option in _MEDIA_TOKENS)
    decoder = get_decoder() if has_media and callable(get_decoder) else None
    if decoder is None or decoder is root or getattr(config, "is_encoder_decoder", False):
        return set()
    head = output_head(root)
    heads = (module for module in root.modules() if isinstance(module, AdapterLayer) and innermost(module) is head)
    return {id(module) for module in (*decoder.modules(), *heads)}
