"""Merges adapters into the weights of a whole model and takes them out again: in all layers, or in none.

Functions return the model that they are given.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from lora_ext._common.arguments import checked
from lora_ext._common.changes import one_at_a_time
from lora_ext._common.matching import Parents
from lora_ext._common.messages import first_of, listed, warn_user
from lora_ext._common.sharded import prepare_shards
from lora_ext.adapters.calibration import Batch, collect_inputs
from lora_ext.injection.inject import forget_injection, lora_modules, replace_modules
from lora_ext.merging.errors import MergeError, poorly_kept
from lora_ext.merging.feedback import LayerInputs
from lora_ext.merging.layers import Outcome, change_merged, merge_error, merge_for_good, stored_matrices
from lora_ext.merging.rounding import LayerSeed, stochastic_seed
from lora_ext.model.adapter_set import adapter_set, check_unmerged
from lora_ext.model.bare_model import (
    BareModel,
    adapter_layers,
    check_not_parallel,
    check_not_sharded,
    parameter_paths,
    root_module,
)
from lora_ext.nn import AdapterLayer, LoraLayer
from lora_ext.nn.trainable_tokens import TrainableTokens
from lora_ext.nn.trained import TrainedModule

_LARGE_ERROR = 0.1  # of the update

ModelT = TypeVar("ModelT", bound=nn.Module)
Names = dict[LoraLayer, set[str]]  # the adapters meant in each layer
Paths = Mapping[LoraLayer, str]


@checked
@one_at_a_time
def merge(
    model: ModelT,
    adapter_names: str | Iterable[str] | None = None,
    *,
    calibration: Iterable[object] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> ModelT:
    """Adds adapters to their base weights in place: the model then runs at the base model's speed.

    :func:`unmerge` restores every bit of the weights. The bits that rounding loses are kept: 0.03 to 0.25 bytes per
    float32 weight for updates of 0.5 % to 10 % of its size; :func:`merge_record_bytes` returns how many. A quantised
    weight is dequantised, and the sum is quantised again in the same format, which loses some of the update
    (:func:`merge_errors` says how much); its stored bytes are kept.

    All layers are checked before the first is changed: all of them are merged, or none. A forward in another thread
    must not run meanwhile.

    Args:
        adapter_names: the adapters to merge, in the layers that have them; None: the active ones. Adapters merged
            earlier stay merged.
        calibration: batches of the adapter's task, about 1,000 tokens, each what the model is called with: by name (a
            dict), a tensor, or a tuple of them. Quantised weights are then rounded so that the layers' outputs on them
            change least (error feedback; Frantar et al. 2022, arXiv 2210.17323), which keeps most of an update that
            nearest rounding loses. The model runs on them in eval mode; a copy of every layer's input is held.
        rounding: "nearest", or "stochastic" for bfloat16 and float16 weights: up or down at random, so that the mean
            of the merged weights is the exact sum. Nearest rounding loses an update that is small against the weights'
            resolution, as early in reinforcement learning.
        seed: of "stochastic", 64 bits. The random numbers depend on it, on the layer's path and on an element's
            position: on every device the merged bits are the same.

    Warns:
        UserWarning: in a quantised layer the error is more than a tenth of the update; or no batch reaches a layer,
            whose weight is then rounded to nearest.

    Raises:
        ValueError: there is no LoRA layer; a merge would not compute the same (a base layer has hooks or a forward of
            its own, its weight is tied to another module, an element would become infinite); ``calibration`` or
            ``rounding`` does not fit the weights.
        TypeError: ``rounding`` is "stochastic" for float32 or float64.
        KeyError: no layer has an adapter of that name.
        RuntimeError: an adapter is merged already, or disabled; a weight is computed, or shares memory with another.
    """
    return _merge("merge", model, adapter_names, calibration, rounding, seed)


@checked
@one_at_a_time
def unmerge(model: ModelT, adapter_names: str | Iterable[str] | None = None) -> ModelT:
    """Takes merged adapters out of their base weights, in place.

    Once a layer has no merged adapter, every bit of its weight is as it was before the first merge.

    Args:
        adapter_names: the adapters to take out, in the layers that have them; None: all merged ones.

    ValueError: there is no LoRA layer. KeyError: no layer has an adapter of that name. RuntimeError: an adapter is not
    merged, or a merged layer was converted to another dtype. Other errors as in
    :meth:`~lora_ext.nn.LoraLinear.unmerge`. The model is then unchanged.
    """
    paths = _all_lora_modules("unmerge", model)
    chosen = _chosen("unmerge", paths, adapter_names, "merged_adapters")
    wrong = [layer for layer, names in chosen.items() if names - {*layer.merged_adapters}]
    if wrong or not chosen:
        raise RuntimeError(f"unmerge: the adapters are not merged into {_some(paths, wrong or paths)}")
    left = {layer: {*layer.merged_adapters} - names for layer, names in chosen.items()}
    change_merged("unmerge", left, _where(paths))
    return model


@checked
def merge_record_bytes(model: nn.Module) -> int:
    """Bytes kept to unmerge: copies of the merged factors, and the bits lost to rounding or the old quantised bytes."""
    return sum(layer.merge_record_bytes for _, layer in lora_modules(model))


@checked
def merge_errors(model: nn.Module) -> dict[str, MergeError]:
    """Returns, by path, what rounding lost of the updates that are merged into the model's layers now.

    Not of DoRA adapters on plain weights. Of a plain weight it takes a copy, and about the time of two merges.
    """
    errors = {path: merge_error(layer) for path, layer in lora_modules(model) if layer._merged is not None}
    return {path: error for path, error in errors.items() if error is not None}


@checked
@one_at_a_time
def merge_and_unload(
    model: ModelT,
    adapter_names: str | Iterable[str] | None = None,
    *,
    calibration: Iterable[object] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
) -> ModelT:
    """Merges adapters for good and puts each base layer back, which gives a plain model.

    No record is kept, so nothing can be unmerged. Adapters merged earlier stay in. The active copy of a module trained
    in full (``modules_to_save``) replaces the original. Parameters keep their ``requires_grad``: the base stays frozen.
    Quantised weights stay so, as by :func:`merge`; Transformers' ``model.dequantize()`` makes a plain model before.

    Raises:
        RuntimeError: the model has an :class:`~lora_ext.AdapterPool`.

    Also the errors of :func:`merge`, except that adapters may be merged already. The model is then unchanged.
    """
    return _merge("merge_and_unload", model, adapter_names, calibration, rounding, seed, unloads=True)


@checked
@one_at_a_time
def unload(model: ModelT) -> ModelT:
    """Removes all adapters: the model is as before :func:`lora_ext.inject`, except that it stays frozen.

    ValueError: there is no adapter layer. RuntimeError: an adapter is merged.
    """
    if not any(adapter_layers(model)):
        raise ValueError(f"unload: {type(model).__name__} has no LoRA layer; call inject(model, config) first")
    _check_can_unload("unload", model, "disable_adapters(model) computes without them")
    check_unmerged("unload", model)
    _unload(model, merged=False)
    return model


# --- merging ----------------------------------------------------------------------------------------------------------


def _merge(
    caller: str,
    model: ModelT,
    adapter_names: str | Iterable[str] | None,
    calibration: Iterable[object] | None,
    rounding: str,
    seed: int,
    unloads: bool = False,
) -> ModelT:
    """Merges as :func:`merge` or, if ``unloads``, as :func:`merge_and_unload`."""
    stochastic = stochastic_seed(caller, rounding, seed)
    paths = _all_lora_modules(caller, model)
    some_merged = any(layer.is_merged for layer in paths)
    chosen = _chosen(caller, paths, adapter_names, "active_adapters")
    if not chosen and not (unloads and some_merged):
        raise RuntimeError(
            f"{caller}: no adapter is active in {_some(paths, paths)}; call set_adapter(model, ...) or load_adapter "
            "first, outside disable_adapters"
        )
    twice = [layer for layer, names in chosen.items() if names & {*layer.merged_adapters}]
    if twice and not unloads:
        raise RuntimeError(f"{caller}: adapters are already merged into {_some(paths, twice)}")
    missing = {layer: names - {*layer.merged_adapters} for layer, names in chosen.items()}
    wanted = {layer: names for layer, names in missing.items() if names}
    _check_mergeable(caller, model, paths, wanted, unloads)
    if unloads:
        _check_can_unload(caller, model, "merge(model) computes the same; for a plain checkpoint, lora-ext merge")
        if (adapters := adapter_set(model)) is not None and adapters.pool is not None:
            raise RuntimeError(
                f"{caller}: the model has an AdapterPool; call pool.close() first, and make another after"
            )
    _check_untied(caller, model, paths, wanted, unloads)
    inputs = _inputs(caller, model, paths, wanted, calibration)
    seeds = {layer: None if stochastic is None else LayerSeed(stochastic, paths[layer]) for layer in wanted}
    if unloads and not some_merged:
        outcomes = merge_for_good(caller, wanted, _where(paths), inputs, seeds)
    else:  # a weight is rounded once for all its adapters: those merged come out first
        names_of = {layer: {*layer.merged_adapters, *names} for layer, names in wanted.items()}
        outcomes = change_merged(caller, names_of, _where(paths), inputs, seeds, measure=True)
    if unloads:
        _unload(model, merged=True)
    _warn_of_errors(caller, {paths[layer]: outcome for layer, outcome in outcomes.items()}, is_calibrated=bool(inputs))
    return model


def _all_lora_modules(caller: str, model: nn.Module) -> dict[LoraLayer, str]:
    """Returns the paths of the LoRA layers of a model that may be merged."""
    paths = {layer: path for path, layer in lora_modules(root_module(model))}
    if not paths:
        raise ValueError(f"{caller}: {type(model).__name__} has no LoRA layer; call inject(model, config) first")
    remedy = "call save_adapter on all ranks, and merge in one process, or on disk (lora-ext merge)"
    check_not_sharded(caller, model, remedy, fsdp_may=True, split_may=True)
    prepare_shards(caller, model)
    return paths


def _chosen(caller: str, layers: Iterable[LoraLayer], adapter_names: str | Iterable[str] | None, default: str) -> Names:
    """Returns the layers that have some of the adapters, with the names they have. None: the names in ``default``."""
    if adapter_names is None:
        return {layer: {*getattr(layer, default)} for layer in layers if getattr(layer, default)}
    names = {adapter_names} if isinstance(adapter_names, str) else {*adapter_names}
    if not names:
        raise ValueError(f"{caller}: adapter_names is empty; name at least one adapter, or pass None for the default")
    known = {name for layer in layers for name in layer.adapters}
    if unknown := names - known:
        raise KeyError(f"{caller}: no layer has an adapter {sorted(unknown)[0]!r}; the adapters are {sorted(known)}")
    return {layer: held for layer in layers if (held := names & layer.adapters.keys())}


def _where(paths: Paths) -> dict[LoraLayer, str]:
    return {layer: f" of {path!r}" for layer, path in paths.items()}


def _some(paths: Paths, layers: Iterable[LoraLayer]) -> str:
    return first_of(repr(paths[layer]) for layer in layers)


def _inputs(
    caller: str, model: nn.Module, paths: Paths, wanted: Names, calibration: Iterable[Batch] | None
) -> dict[LoraLayer, LayerInputs]:
    """Returns the inputs of the layers whose quantised weights change, for ``calibration``."""
    if calibration is None:
        return {}
    if idle := [layer for layer, names in wanted.items() if names - {*layer.active_adapters}]:
        raise ValueError(
            f"{caller}: calibration runs the model with its active adapters, but others are to be merged into "
            f"{_some(paths, idle)}; activate them first (set_adapter)"
        )
    matrices = [(layer, matrix.quantized) for layer in wanted for matrix in layer.matrices().values()]
    weights = [(layer, weight) for layer, weight in matrices if weight is not None and weight.rounds]
    if not weights:
        raise ValueError(f"{caller}: calibration is for quantised weights, and none to merge into is; leave it out")
    if others := [f"{paths[layer]!r} ({weight.name})" for layer, weight in weights if not weight.has_grid]:
        warn_user(
            f"{caller}: calibration has no effect on {first_of(others)}, which are rounded to nearest; error feedback "
            "is for int8, and for NF4 and FP4 whose blocks end where rows do"
        )
    layers = {paths[layer]: layer for layer, weight in weights if weight.has_grid}
    return collect_inputs(caller, model, layers, calibration) if layers else {}


def _warn_of_errors(caller: str, outcomes: Mapping[str, Outcome], is_calibrated: bool) -> None:
    """Warns if rounding lost a part of an update. ``outcomes``: by the layers' paths."""
    errors = {path: outcome.error for path, outcome in outcomes.items() if outcome.error is not None}
    of_update = [error.of_update for error in errors.values()]
    if max(of_update, default=0.0) > _LARGE_ERROR:
        worst = sorted(errors, key=lambda path: errors[path].kept)[:3]
        remedy = "" if is_calibrated else "batches of the task (calibration=) keep more of it; "
        warn_user(
            f"{caller}: {len(errors)} weights were quantised again, with errors of {statistics.median(of_update):.0%} "
            f"of the update (median; at most {max(of_update):.0%}), which keeps least in "
            f"{', '.join(f'{path!r} ({errors[path].kept:.0%})' for path in worst)}; {remedy}merge_errors(model) has "
            "them by layer; to lose nothing, run unmerged, or load the adapter into the dequantised model "
            "(model.dequantize())"
        )
    kept = {path: outcome.kept for path, outcome in outcomes.items() if outcome.error is None}
    if line := poorly_kept(kept, "rounding='stochastic' keeps it in the mean"):
        warn_user(f"{caller}: {line}")


def _check_mergeable(caller: str, model: nn.Module, paths: Paths, wanted: Names, unloads: bool) -> None:
    """Checks that adding to the weights does what the layers' forwards do."""
    if problems := [f"{paths[layer]}: {why}" for layer in wanted if (why := layer.why_not_merge())]:
        raise ValueError(f"{caller}: updates cannot be merged into{listed(problems)}")
    adapters = adapter_set(model)
    biased = [layer for layer, names in wanted.items() if any(layer.adapters[n].lora_bias is not None for n in names)]
    if not unloads and biased and adapters is not None and adapters.biases:
        (owner,) = adapters.biases
        raise ValueError(
            f"{caller}: the lora_bias of {paths[biased[0]]!r} would go into a bias that {owner!r} trains and that is "
            "switched with that adapter; run unmerged, or merge for good (merge_and_unload)"
        )


def _check_untied(caller: str, model: nn.Module, paths: Paths, wanted: Names, unloads: bool) -> None:
    """Checks that merging changes no other module, and no trained rows.

    ``unloads``: trained rows are written into the weights, too, and modules trained in full replace the frozen ones.
    """
    labels: dict[int, str] = {}  # by the id of each parameter that changes
    changed_by: dict[int, list[str]] = defaultdict(list)  # the layers that may hold it
    for layer, names in wanted.items():
        for key, matrix, _, label in stored_matrices(caller, layer, f" of {paths[layer]!r}"):
            parameter = id(matrix.owner._parameters[matrix.name])
            if parameter not in labels and any(key in layer.factors(name) for name in names):
                labels[parameter], changed_by[parameter] = label, [paths[layer]]
    replaced, rows_of = [], {}
    for path, layer in adapter_layers(model):
        if isinstance(layer, TrainedModule) and unloads and layer.in_use is not layer.base_layer:
            replaced.append(f"{path}.base_layer")
        if not isinstance(layer, TrainableTokens):
            continue
        if layer.base_layer in wanted and isinstance(layer.inner_layer, nn.Linear):
            raise ValueError(
                f"{caller}: the weight of {paths[layer.base_layer]!r} has trained rows (trainable_token_indices), "
                "which would lose the update; run unmerged"
            )
        parameter = id(layer.inner_layer.weight)
        rows = layer.rows_in_use if unloads and parameter not in labels else []
        if rows and rows_of.setdefault(parameter, rows) == rows:  # tied modules share them
            changed_by[parameter].append(path)
    holders = parameter_paths(root_module(model).named_modules())
    for parameter, changing in changed_by.items():
        known = Parents((*changing, *replaced))
        if others := [path for path in holders[parameter] if path not in known]:
            label = labels.get(parameter, f"the weight of {changing[0]!r}")
            raise ValueError(
                f"{caller}: {label} is shared with {others[0]!r}, which would change too; untie them (give one a clone "
                "of the weight), or run unmerged"
            )


# --- the plain model --------------------------------------------------------------------------------------------------


def _check_can_unload(caller: str, model: nn.Module, remedy: str) -> None:
    check_not_parallel(caller, model)
    check_not_sharded(caller, model, remedy, split_may=True)
    if (adapters := adapter_set(model)) is not None:
        adapters.check_enabled(caller)
        adapters.active.check_unused(caller)


def _unload(model: nn.Module, merged: bool) -> None:
    if not merged and (adapters := adapter_set(model)) is not None:
        adapters.switch(())  # restores the model's own biases
    while layers := [layer for _, layer in adapter_layers(model)]:  # layers may be nested
        inner = {id(child) for layer in layers for child in layer.children() if isinstance(child, AdapterLayer)}
        outer = [layer for layer in layers if id(layer) not in inner]
        replace_modules(root_module(model), {layer: layer.unloaded(merged) for layer in outer})
    forget_injection(model)
    if merged:
        _note_untied(root_module(model))


def _note_untied(root: nn.Module) -> None:
    """Corrects a Transformers config that says that the head is tied, if it has a trained weight of its own now."""
    if getattr(getattr(root, "config", None), "tie_word_embeddings", False):
        bare = BareModel(root)
        head = getattr(bare.head, "weight", None)
        # T5Gemma ties the head to the decoder's embedding; get_input_embeddings returns the encoder's.
        if head is not None and len(parameter_paths(bare.modules.items())[id(head)]) == 1:
            root.config.tie_word_embeddings = False  # from_pretrained would tie them, and drop the head
