"""Checks that merging adapters of a model changes what it should, and nothing else."""

from __future__ import annotations

from collections import defaultdict

from torch import nn

from lora_ext._common.printable import listed
from lora_ext.matching.path_names import is_inside
from lora_ext.merging.layers import stored_matrices, update_identity
from lora_ext.model.adapter_set import adapter_set
from lora_ext.model.bare_model import adapter_layers, parameter_paths, root_module
from lora_ext.nn import LoraLayer
from lora_ext.nn.trainable_tokens import TrainableTokens
from lora_ext.nn.trained import TrainedModule


def check_mergeable(caller: str, wanted: dict[str, tuple[LoraLayer, set[str]]]) -> None:
    """Checks that adding to the weights does what the layers' forwards do."""
    problems = [f"{path}: {reason}" for path, (layer, names) in wanted.items() if (reason := layer.why_not_merge())]
    if problems:
        raise ValueError(f"{caller}: updates cannot be merged into{listed(problems)}")


def check_untied(
    caller: str, model: nn.Module, wanted: dict[str, tuple[LoraLayer, set[str]]], unloads: bool = False
) -> None:
    """Checks that merging changes no other module, except those with tied adapters, and no trained rows.

    ``unloads``: trained rows are written into the weights, too, and modules trained in full replace the frozen ones.
    """
    layers = list(adapter_layers(model))
    _check_rows_keep_updates(caller, [layer for _, layer in layers if isinstance(layer, TrainableTokens)], wanted)
    replaced = [
        f"{path}.base_layer"
        for path, layer in layers
        if unloads and isinstance(layer, TrainedModule) and layer.in_use is not layer.base_layer
    ]
    paths = parameter_paths(root_module(model).named_modules())
    updates_of, labels = _updates_of_shared(caller, paths, wanted)
    for path, layer in layers if unloads else ():
        if isinstance(layer, TrainableTokens) and (rows := layer.rows_in_use):
            parameter = id(layer.inner_layer.weight)
            updates_of[parameter][path] = (*updates_of[parameter].get(path, ()), *map(id, rows))
            labels.setdefault(parameter, f"the weight of {path!r}")
    for parameter, updates in updates_of.items():
        expected = next(iter(updates.values()))  # all modules that hold the parameter must want the same
        others = [
            path
            for path in paths[parameter]
            if not any(is_inside(path, frozen) for frozen in replaced)
            and not any(is_inside(path, other) and updates[other] == expected for other in updates)
        ]
        if others:
            raise ValueError(
                f"{caller}: {labels[parameter]} is shared with {others[0]!r}, which would change too; adapt both with "
                "ensure_weight_tying=True, untie them (give one a clone of the weight), or run unmerged"
            )


def _check_rows_keep_updates(
    caller: str, layers: list[TrainableTokens], wanted: dict[str, tuple[LoraLayer, set[str]]]
) -> None:
    """Checks that no linear layer inside a layer with trained rows is merged: its rows would lose the update."""
    for layer in layers:
        for path, (inner, _) in wanted.items():
            if layer.base_layer is inner and isinstance(layer.inner_layer, nn.Linear):
                raise ValueError(
                    f"{caller}: the weight of {path!r} has trained rows (trainable_token_indices), which would lose "
                    "the update; run unmerged"
                )


def _updates_of_shared(
    caller: str, paths: dict[int, list[str]], wanted: dict[str, tuple[LoraLayer, set[str]]]
) -> tuple[dict[int, dict[str, tuple]], dict[int, str]]:
    """Finds the updates of parameters that several modules hold, by ``id(parameter)`` and by the layer's path.

    Updates are keys that are equal if they are the same. Also returns the parameters' names in messages.
    """
    updates_of: dict[int, dict[str, tuple]] = defaultdict(dict)
    labels: dict[int, str] = {}
    for path, (layer, names) in wanted.items():
        for key, matrix, _, label in stored_matrices(caller, layer, f" of {path!r}"):
            parameter = id(matrix.owner._parameters[matrix.name])
            if len(paths[parameter]) > 1:
                updates = [update_identity(layer, key, name) for name in sorted(names) if key in layer.factors(name)]
                updates_of[parameter][path] = (*updates_of[parameter].get(path, ()), *updates)
                labels.setdefault(parameter, label)
    return updates_of, labels


def check_biases(model: nn.Module, wanted: dict[str, tuple[LoraLayer, set[str]]]) -> None:
    """Checks that no update would be merged into a bias that an adapter trains: switching adapters replaces it."""
    adapters = adapter_set(model)
    for trainer, biases in adapters.biases.items() if adapters is not None else ():
        for path, (layer, names) in wanted.items():
            biased = any(layer.adapters[name].lora_bias is not None for name in names)
            if biased and layer.bias is not None and biases.owns(layer.bias):
                raise ValueError(
                    f"merge: the lora_bias of {path!r} would go into a bias that {trainer!r} trains and that is "
                    "switched with that adapter; run unmerged, or merge for good (merge_and_unload)"
                )
