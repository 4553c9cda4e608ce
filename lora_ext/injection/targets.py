"""Finds the parts of a model that a config names, by PEFT's rules: a PEFT config selects the same parts here.

These are pure functions of names and modules; build.py refuses parts that cannot be adapted.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from lora_ext._common.matching import EndTable, LayerNumbers, Parents, PathMatcher, path_ends
from lora_ext._common.messages import shown, warn_user
from lora_ext.config import LoraConfig
from lora_ext.injection.all_linear import is_all_linear, linear_layers
from lora_ext.model.bare_model import BareModel, parameter_paths

_MOST_CLOSE, _LONGEST_CLOSE = 5, 100  # close matches take time per name, and help only with names written by hand
_TOKENS = "trainable_token_indices"


@dataclass(frozen=True)
class Targets:
    """The parts to adapt and to train, by path, in the model's order."""

    modules: dict[str, nn.Module]  # to adapt
    parameters: dict[str, tuple[str, ...]]  # bare ones to adapt, by the module's path, in the order of PEFT's keys
    trained: dict[str, nn.Module]  # to train in full
    tokens: dict[str, tuple[int, ...]]  # of embeddings with trained rows
    tied: dict[str, str]  # modules that share the input embedding's weight and its rows: the embedding's path


def find_targets(config: LoraConfig, bare: BareModel) -> Targets:
    """Finds the parts of a model that ``config`` names.

    ValueError: nothing matches (names close matches), or a part is named for two purposes.

    Warns of an entry that matches nothing while others do (PEFT is silent, and a misspelt layer is not adapted), and of
    a module to save that shares a parameter with a module that is not saved.
    """
    search = _Search(config, bare)
    trained = search.find_trained()
    parameters = search.find_parameters(trained)
    modules = search.find_modules(trained, parameters)
    tokens, tied = search.find_tokens(trained, modules)
    adapted = {*modules, *(f"{path}.{name}" for path in parameters for name in parameters[path])}
    for key, unused in config.unused_settings(adapted).items():
        if unused:
            search.warnings.append(f"inject: {key} {shown(unused)} matches nothing adapted in {search.root_name}")
    for message in search.warnings:
        warn_user(message)
    return Targets(modules, parameters, trained, tokens, tied)


class _Search:
    """The steps of one search: what one finds, the later ones leave out or refuse."""

    def __init__(self, config: LoraConfig, bare: BareModel) -> None:
        self.config, self.bare, self.modules = config, bare, bare.modules
        self.root_name = type(bare.root).__name__
        self.warnings: list[str] = []  # issued at the end, when nothing can fail any more

    def find_trained(self) -> dict[str, nn.Module]:
        """Modules to train in full: those whose path ends with an entry, after a dot or not."""
        names, heads = self.config.trained_modules, self.config.task_heads
        trained = {path: module for path, module in self.modules.items() if path.endswith(names)}
        # No report for the heads that a task adds (and PEFT writes into the file): the user did not write them.
        unmatched = [name for name in names if name not in heads and not any(path.endswith(name) for path in trained)]
        self.report_unmatched("modules_to_save", unmatched, fatal=not trained)
        paths, inside = parameter_paths(self.modules.items()), Parents(trained)
        for path, module in trained.items():
            others = [other for p in module.parameters() for other in paths[id(p)] if other not in inside]
            if others:
                self.warnings.append(
                    f"inject: modules_to_save has {path!r}, which shares a parameter with {others[0]!r}: its "
                    "trained copy does not, as in PEFT. To train them as one, add the other to it"
                )
        return trained

    def find_parameters(self, trained: Mapping[str, nn.Module]) -> dict[str, tuple[str, ...]]:
        """Bare parameters to adapt."""
        names = self.config.target_parameters or ()
        named, inside, matched = EndTable(names), Parents(trained), set()
        found: dict[str, list[str]] = defaultdict(list)
        for path, name in self.parameters() if names else ():
            if entries := named.find(f"{path}.{name}"):
                if path in inside:
                    _refuse_twice(f"{path}.{name}", "target_parameters", "modules_to_save")
                matched.update(entries)
                found[path].append(name)
        unmatched = [entry for entry in names if entry not in matched]
        self.report_unmatched("target_parameters", unmatched, fatal=not found and not self.config.target_modules)
        return {path: tuple(names) for path, names in found.items()}

    def parameters(self) -> Iterator[tuple[str, str]]:
        """Yields ``(module path, name)`` of every parameter that can be a target, in PEFT's order."""
        for path, module in self.modules.items():
            if not hasattr(module, "parametrizations"):
                yield from ((path, name) for name, _ in module.named_parameters(recurse=False))

    def find_modules(
        self, trained: Mapping[str, nn.Module], parameters: Mapping[str, tuple[str, ...]]
    ) -> dict[str, nn.Module]:
        """Modules to adapt: those that ``target_modules`` names, without excluded ones, other layers and the above."""
        config = self.config
        if is_all_linear(config):
            named = linear_layers(self.bare)
        else:
            named = self.matched("target_modules", fatal=not parameters)
        excluded = set(self.matched("exclude_modules", fatal=False))
        layers, inside = LayerNumbers(config), Parents(trained)
        targets = {
            path: self.modules[path] for path in named if path in layers and path not in excluded and path not in inside
        }
        if not targets and not parameters:
            raise ValueError(
                f"inject: nothing is left to adapt in {self.root_name}: target_modules matches {shown(named)}, without "
                "those of exclude_modules, modules_to_save, task_type and other layers_to_transform"
                + "; name a layer in target_modules to see why it cannot be adapted"
                * (not named)
            )
        for path in parameters:
            if path in targets:
                _refuse_twice(path, "target_parameters", "target_modules")
        return targets

    def matched(self, key: str, *, fatal: bool) -> list[str]:
        """The paths that the names or the expression under ``key`` cover; reports entries that cover none."""
        names = getattr(self.config, key)
        found = list(filter(PathMatcher(key, names), self.modules))
        if isinstance(names, str):
            unmatched = [] if found else [names]
        else:
            ends = {end for path in found for end in path_ends(path)}
            unmatched = [name for name in names or () if name not in ends]
        self.report_unmatched(key, unmatched, fatal=fatal and not found)
        return found

    def find_tokens(
        self, trained: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]
    ) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Embeddings with trained rows, and the modules that share their weight and follow them."""
        wanted = self.config.trainable_token_indices
        if wanted is None:
            return {}, {}
        embedding = next((path for path, module in self.modules.items() if module is self.bare.embedding), "")
        if not isinstance(wanted, Mapping):
            wanted = {embedding or "embed_tokens": wanted}  # "embed_tokens" is PEFT's guess
        tokens: dict[str, tuple[int, ...]] = {}
        unmatched, saved, adapted = [], Parents(trained), Parents(targets)
        for name, indices in wanted.items():
            paths = [path for path in self.modules if path.endswith(name)]
            unmatched += [name] * (not paths)
            for path in paths:
                if path in saved or path in adapted:
                    _refuse_twice(path, _TOKENS, "modules_to_save" if path in saved else "target_modules")
                if tokens.setdefault(path, indices) != indices:
                    raise ValueError(f"inject: {_TOKENS} names {path!r} twice, with different tokens")
        self.report_unmatched(_TOKENS, unmatched, fatal=True)

        # The rows are the embedding's, also in modules tied to it, unless these have rows of their own, as in PEFT.
        holders = parameter_paths(self.modules.items())
        twins = [path for path in holders[id(getattr(self.bare.embedding, "weight", None))] if path != embedding]
        if embedding not in tokens or any(tokens.get(twin, tokens[embedding]) != tokens[embedding] for twin in twins):
            return tokens, {}
        for twin in twins:
            if twin in saved:
                _refuse_twice(twin, f"{_TOKENS}, with {embedding!r} that it follows,", "modules_to_save")
            tokens.pop(twin, None)
        return tokens, dict.fromkeys(twins, embedding)

    def report_unmatched(self, key: str, unmatched: list[str], *, fatal: bool) -> None:
        """Refuses, or warns about, entries that match nothing; the message names close matches."""
        if not unmatched:
            return
        is_parameter = key == "target_parameters"
        paths = [f"{path}.{name}" for path, name in self.parameters()] if is_parameter else list(self.modules)
        ends = list(dict.fromkeys(".".join(path.split(".")[-count:]) for count in (1, 2) for path in paths))
        written = [name for name in unmatched[:_MOST_CLOSE] if len(name) <= _LONGEST_CLOSE]
        close = dict.fromkeys(match for name in written for match in difflib.get_close_matches(name, [*ends, *paths]))
        what = "parameter" if is_parameter else "module"
        message = f"inject: {key} {shown(unmatched)} matches no {what} of {self.root_name}; "
        if isinstance(getattr(self.config, key), str):
            message += "a string is an expression for whole paths, write names as a list; "
        message += f"close matches: {', '.join(map(repr, close))}" if close else f"it has {shown(ends)}"
        if fatal:
            raise ValueError(message)
        self.warnings.append(message)


def _refuse_twice(path: str, key: str, other: str) -> NoReturn:
    raise ValueError(f"inject: {key} names {path!r}, and so does {other}; remove it from one of the two")
