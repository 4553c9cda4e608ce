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

from lora_ext._common.messages import shown
from lora_ext._common.modules import embeddings_of, remove_hooks
from lora_ext.model.adapter_set import AdapterSet, adapter_set, find_adapters
from lora_ext.model.bare_model import adapter_layers
from lora_ext.model.replaced_methods import ReplacedMethod
from lora_ext.nn.adapter_layer import layers_around
from lora_ext.nn.rows import BASE, RowChoice, choosing, enter, leave

NAMES = "adapter_names"
_METHODS = "generate", "generate_batch"


# --- into a model and out of it ---------------------------------------------------------------------------------------


def serve_adapter_names(root: nn.Module, parts: Iterable[nn.Module]) -> None:
    """Makes ``root`` take ``adapter_names``, unless its forward has a parameter of that name.

    ``parts`` of it refuse them, as their forwards would swallow them in ``**kwargs``.
    """
    if NAMES in inspect.signature(root.forward).parameters:
        return
    for module in (root, *parts):
        if take_adapter_names not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(take_adapter_names, with_kwargs=True)
    if end_call not in root._forward_hooks.values():
        root.register_forward_hook(end_call, always_call=True)
        for name in _METHODS:
            MethodWithNames.put(name, root)


def forget_adapter_names(module: nn.Module) -> None:
    """Undoes :func:`serve_adapter_names`, except for methods (:func:`~lora_ext.model.replaced_methods.put_back`)."""
    remove_hooks(module, take_adapter_names, end_call)


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
    if "adapter_lengths" in kwargs:
        raise ValueError(
            f"{type(module).__name__}: there is no adapter_lengths; pass a sequence, and a name, for each row"
        )
    if NAMES in kwargs:
        rest = {key: value for key, value in kwargs.items() if key != NAMES}
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        if names is not None or adapters.active.mixed_calls > 0:
            from lora_ext.nn.compiled_rows import refuse_compiled

            refuse_compiled()
    else:
        _end_choice(adapters)  # of a call that Ctrl-C left without running its hook: no model calls itself
        caller, outer = type(module).__name__, adapters.active.running.choice
        if names is not None:
            enter(choice_of(module, adapters, names, _by_name(args, rest), caller))
        elif outer is not None:  # a step of generate
            _note_rows(module, outer, _by_name(args, rest), caller)
    return None if rest is kwargs else (args, rest)


def end_call(module: nn.Module, args: Any, output: Any) -> None:
    """Ends the choice that the call began; a hook after the forward, which also runs after an error."""
    if torch.compiler.is_compiling():
        return
    _end_choice(adapter_set(module), output)


def _end_choice(adapters: AdapterSet, output: Any = None) -> None:
    """Ends the choice of a single call, if one is current; that of ``generate`` stays."""
    choice = adapters.active.running.choice
    if choice is not None and choice.repeats is None:
        leave(choice, output)


class MethodWithNames(ReplacedMethod):
    """The ``generate`` or ``generate_batch`` of an injected model.

    ``generate`` takes a name for each prompt, also for all its beams or returned sequences. ``generate_batch`` refuses
    names: Transformers' would ignore them.
    """

    def __call__(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if (adapters := adapter_set(self.module)) is not None:
            _end_choice(adapters)
        if adapter_names is None:
            return self.original(*args, **kwargs)
        caller = f"{type(self.module).__name__}.{self.name}"
        adapters = find_adapters(self.module, caller)  # a method's modules may be left in the model alone
        if self.name != "generate":
            raise ValueError(
                f"{caller}: {NAMES} is for calls of the model and generate; servers with continuous batching, such as "
                "vLLM and SGLang, read the files of save_adapter"
            )
        values = _by_name(args, kwargs)
        choice = choice_of(self.module, adapters, adapter_names, values, caller)
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

    TypeError: ``names`` is no list of strings. KeyError: there is no such adapter. ValueError: the batch has another
    number of rows; or its rows cannot choose: an adapter has a part that is the same for all rows, a layer gets
    something else than rows, or a pool's adapters would train.
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
    _check_biases(adapters, used, caller)
    if not is_uniform:
        _check_rows(root, used, values, caller)
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
# Layers that compute all rows alike refuse by themselves (LoraLayer._applied_to_all), as do those whose input has no
# row for each name (RowChoice.aligned).


def _check_biases(adapters: AdapterSet, used: Iterable[str], caller: str) -> None:
    for name, biases in adapters.biases.items():
        if biases.used or name in used:
            raise ValueError(
                f"{caller}: {NAMES}: {name!r} trains the model's biases, which all rows share; activate another one "
                "(set_adapter), and leave it out of the names, or give each adapter its own (lora_bias=True)"
            )


# Layers of these models of Transformers get [tokens, rows, features]. With as many tokens as rows, nothing would tell.
_TOKENS_FIRST = ("xlnet", "longformer", "led", "fsmt")
_MEDIA = "pixel_values", "image_pixel_values", "input_features", "input_values", "audio"
_MEDIA_TOKENS = "image_token_id", "video_token_id", "audio_token_id"


def _check_rows(root: nn.Module, used: Mapping[str, None], values: Mapping[str, Any], caller: str) -> None:
    """Refuses different names where a layer's input may look as if it had a row for each, though it has none."""
    if getattr(getattr(root, "config", None), "model_type", None) in _TOKENS_FIRST:
        raise ValueError(f"{caller}: {NAMES}: its layers get tokens first; call the model once for each (set_adapter)")
    has_media = any(name.startswith(_MEDIA) for name, _ in _tensors(values))
    of_text = _modules_of_text(root) if has_media else ()
    for path, layer in adapter_layers(root) if of_text else ():
        is_used = not used.keys().isdisjoint(layer.adapters) or getattr(layer, "slots", None) is not None
        if is_used and id(layer) not in of_text:
            raise ValueError(
                f"{caller}: {NAMES}: {path!r} ({type(layer).__name__}) computes images or sounds, those of all rows in "
                "one batch; leave it out of the adapter, or call the model once for each (set_adapter)"
            )


def _modules_of_text(root: nn.Module) -> set[int]:
    """The ids of the modules that a model of text and media calls with the rows of the text; empty for other models."""
    config, get_decoder = getattr(root, "config", None), getattr(root, "get_decoder", None)
    has_media = any(type(getattr(config, option, None)) is int for option in _MEDIA_TOKENS)
    decoder = get_decoder() if has_media and callable(get_decoder) else None
    if decoder is None or decoder is root or getattr(config, "is_encoder_decoder", False):
        return set()
    return {id(module) for module in (*decoder.modules(), *layers_around(embeddings_of(root, "output")))}
