"""Finds the parts of a model that a config names, by PEFT's rules: a PEFT config selects the same parts here.

These are pure functions of names and modules; check_targets.py refuses parts that cannot be adapted.
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from lora_ext._common.printable import shown
from lora_ext._common.warnings import warn_user
from lora_ext.config import LoraConfig
from lora_ext.injection.all_linear import is_all_linear, linear_layers, why_left_out
from lora_ext.matching.path_names import EndTable, Parents, SuffixTable, path_ends
from lora_ext.matching.path_patterns import LayerNumbers, PathMatcher
from lora_ext.model.bare_model import BareModel, parameter_paths
from lora_ext.nn.linear import is_linear

_MOST_CLOSE, _LONGEST_CLOSE = 5, 100
_TOKENS = "trainable_token_indices"


@dataclass(frozen=True)
class Targets:
    """The parts to adapt, to train and to tie, by path, in the model's order.

    Attributes:
        modules: modules to adapt.
        parameters: bare parameters to adapt: module path -> names. PEFT nests one wrapper per name around the module,
            the first innermost, and its file keys follow that order.
        trained: modules to train in full.
        tokens: embeddings with trained rows: path -> token numbers.
        tied: modules that share the input embedding's weight and its trained rows: path -> the embedding's path, which
            is in ``tokens``.
    """

    modules: dict[str, nn.Module]
    parameters: dict[str, tuple[str, ...]]
    trained: dict[str, nn.Module]
    tokens: dict[str, tuple[int, ...]]
    tied: dict[str, str]


def find_targets(config: LoraConfig, bare: BareModel) -> Targets:
    """Finds the parts of a model that ``config`` names.

    Raises:
        ValueError: nothing matches (names close matches), or a part is named for two purposes.

    Warns:
        UserWarning: an entry matches nothing while others do (PEFT is silent, and a misspelt layer is not adapted);
            a module to save shares a parameter with a module that is not saved.
    """
    return _Search(config, bare).run()


class _Search:
    """One search, whose steps depend on each other: what one finds, the later ones leave out or refuse.

    Attributes:
        embedding, twins: the path of the input embedding, or "", and the paths of the modules that share its weight.
        tied: the twins that follow the embedding; filled by the steps.
        warnings: issued at the end, when nothing can fail any more.
    """

    def __init__(self, config: LoraConfig, bare: BareModel) -> None:
        self.config, self.bare, self.modules = config, bare, bare.modules
        self.root_name = type(bare.root).__name__
        self.embedding, self.twins = _tied_embedding(bare)
        self.warnings: list[str] = []
        self.tied: dict[str, str] = {}

    def run(self) -> Targets:
        trained = self.find_trained()
        parameters = self.find_parameters(trained)
        targets = self.find_modules(trained, parameters)
        tokens = self.find_tokens(trained, targets)
        self.check_leftovers({*targets, *(f"{path}.{n}" for path in parameters for n in parameters[path])})
        for message in self.warnings:
            warn_user(message)
        return Targets(targets, parameters, trained, tokens, self.tied)

    def find_trained(self) -> dict[str, nn.Module]:
        """Modules to train in full: those whose path ends with an entry, after a dot or not."""
        named = SuffixTable(self.config.trained_modules)
        found = {path: names for path in self.modules if (names := named.find(path))}
        trained = {path: self.modules[path] for path in found}
        # No report for the heads that a task adds (and PEFT writes into the file): the user did not write them.
        wanted = set(self.config.modules_to_save or ()) - set(self.config.task_heads)
        unmatched = sorted(wanted.difference(*found.values()))
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
        if not names:
            return {}
        named, inside, matched = EndTable(names), Parents(trained), set()
        found: dict[str, list[str]] = defaultdict(list)
        for path, name in _parameters(self.modules):
            if not (entries := named.find(f"{path}.{name}")):
                continue
            matched.update(entries)
            if path in inside:
                _refuse_twice(f"{path}.{name}", "target_parameters", "modules_to_save")
            found[path].append(name)
        unmatched = [entry for entry in names if entry not in matched]
        self.report_unmatched("target_parameters", unmatched, fatal=not found and not self.config.target_modules)
        return {path: tuple(names) for path, names in found.items()}

    def find_modules(
        self, trained: Mapping[str, nn.Module], parameters: Mapping[str, tuple[str, ...]]
    ) -> dict[str, nn.Module]:
        """Modules to adapt: those that ``target_modules`` names, without excluded ones, other layers and the above."""
        config = self.config
        if is_all_linear(config):
            named = linear_layers(self.bare)
        else:
            named = list(filter(PathMatcher("target_modules", config.target_modules), self.modules))
            unmatched = self.unmatched(config.target_modules, named)
            self.report_unmatched("target_modules", unmatched, fatal=not named and not parameters)
        excluded = set(filter(PathMatcher("exclude_modules", config.exclude_modules), self.modules))
        unmatched = self.unmatched(config.exclude_modules, excluded)
        self.report_unmatched("exclude_modules", unmatched, fatal=False)

        whole = () if isinstance(config.target_modules, str) else config.target_modules or ()
        layers = LayerNumbers(config.layers_to_transform, config.layers_pattern, whole)
        inside = Parents(trained)
        targets = {
            path: self.modules[path] for path in named if path in layers and path not in excluded and path not in inside
        }
        if not targets and not parameters:
            raise ValueError(self.why_nothing(named))
        for path in parameters:
            if path in targets:
                _refuse_twice(path, "target_parameters", "target_modules")
        return targets

    def find_tokens(
        self, trained: Mapping[str, nn.Module], targets: Mapping[str, nn.Module]
    ) -> dict[str, tuple[int, ...]]:
        """Embeddings with trained rows, and the numbers of their tokens."""
        wanted = self.config.trainable_token_indices
        if wanted is None:
            return {}
        if not isinstance(wanted, Mapping):
            wanted = {self.embedding or "embed_tokens": wanted}  # "embed_tokens" is PEFT's guess
        named, matches = SuffixTable(wanted), {name: [] for name in wanted}
        for path in self.modules:
            for name in named.find(path):
                matches[name].append(path)
        self.report_unmatched(_TOKENS, [name for name, paths in matches.items() if not paths], fatal=True)

        tokens: dict[str, tuple[int, ...]] = {}
        saved, adapted = Parents(trained), Parents(targets)
        for path, indices in ((path, wanted[name]) for name, paths in matches.items() for path in paths):
            if path in saved or path in adapted:
                _refuse_twice(path, _TOKENS, "modules_to_save" if path in saved else "target_modules")
            if tokens.setdefault(path, indices) != indices:
                raise ValueError(f"inject: {_TOKENS} names {path!r} twice, with different tokens")
        self.tie_tokens(tokens, saved)
        return tokens

    def tie_tokens(self, tokens: dict[str, tuple[int, ...]], saved: Parents) -> None:
        """Gives the embedding's rows to the modules tied to it, unless they have rows of their own, as PEFT does."""
        if len({tokens[path] for path in (self.embedding, *self.twins) if path in tokens}) > 1:
            return
        for twin in self.twins if self.embedding in tokens else ():
            if twin in saved:
                _refuse_twice(twin, f"{_TOKENS}, with {self.embedding!r} that it follows,", "modules_to_save")
            tokens.pop(twin, None)
            self.tied[twin] = self.embedding

    def unmatched(self, names: tuple[str, ...] | str | None, found: Iterable[str]) -> list[str]:
        """The entries of a list, or the regular expression, that cover none of the paths ``found``."""
        if isinstance(names, str):
            return [] if any(True for _ in found) else [names]
        ends = {path[begin:] for path in found for begin in path_ends(path)}
        return [name for name in names or () if name not in ends]

    def why_nothing(self, named: list[str]) -> str:
        if not named:
            whys = (
                f"; {path} cannot be adapted: {why}" for path in self.modules if (why := why_left_out(self.bare, path))
            )
            return f"inject: {self.root_name} has no linear layer to adapt except its output head{next(whys, '')}"
        keys = ("exclude_modules", "modules_to_save", "task_type", "layers_to_transform", "layers_pattern")
        given = ", ".join(f"{key}={shown(value)}" for key in keys if (value := getattr(self.config, key)))
        return (
            f"inject: nothing is left to adapt in {self.root_name}: target_modules matches {shown(named)}, and "
            f"other settings exclude them all ({given})"
        )

    def check_leftovers(self, targets: set[str]) -> None:
        """Warns about settings without effect."""
        for key, unused in self.config.unused_settings(targets).items():
            if unused:
                self.warnings.append(f"inject: {key} {shown(unused)} matches nothing adapted in {self.root_name}")

    def report_unmatched(self, key: str, unmatched: list[str], *, fatal: bool) -> None:
        """Refuses, or warns about, entries that match nothing; the message names close matches."""
        if not unmatched:
            return
        if key == "target_parameters":
            plural, paths = "parameters", [f"{path}.{name}" for path, name in _parameters(self.modules)]
            ends = [path.split(".", path.count(".") - 1)[-1] for path in paths]
            examples = paths
        else:
            plural, paths = "embeddings" if key == _TOKENS else "linear layers", list(self.modules)
            ends = [path.rpartition(".")[2] for path in paths]
            wanted = (lambda m: isinstance(m, nn.Embedding)) if key == _TOKENS else is_linear
            examples = [end for end, module in zip(ends, self.modules.values(), strict=True) if wanted(module)]
        candidates = list(dict.fromkeys([*ends, *paths]))
        # Close matches take time per name, and help only with names written by hand.
        written = [name for name in unmatched[:_MOST_CLOSE] if len(name) <= _LONGEST_CLOSE]
        close = dict.fromkeys(match for name in written for match in difflib.get_close_matches(name, candidates))
        entries, kind = getattr(self.config, key), "parameter" if examples is paths else "module"
        message = (
            f"inject: {key} {shown(unmatched)} matches no {kind} of {self.root_name}; "
            + "a string is an expression for whole paths, write names as a list; " * isinstance(entries, str)
            + (f"close matches: {', '.join(map(repr, close))}; " if close else "")
            + f"its {plural} include {', '.join(map(repr, list(dict.fromkeys(examples))[:8])) or 'none'}"
        )
        if fatal:
            raise ValueError(message)
        self.warnings.append(message)


def _refuse_twice(path: str, key: str, other: str) -> NoReturn:
    raise ValueError(f"inject: {key} names {path!r}, and so does {other}; remove it from one of the two")


def _tied_embedding(bare: BareModel) -> tuple[str, list[str]]:
    """The path of the input embedding ("" if there is none), and the paths of the modules that share its weight."""
    path = next((path for path, module in bare.modules.items() if module is bare.embedding), "")
    weights = bare.embedding._parameters.values() if path else ()
    holders = parameter_paths(bare.modules.items())
    shared = {holder for weight in weights if weight is not None for holder in holders[id(weight)]} - {path}
    return path, [path for path in bare.modules if path in shared]


def _parameters(modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str]]:
    """Yields ``(module path, name)`` of every parameter that can be a target, in PEFT's order."""
    for path, module in modules.items():
        if not hasattr(module, "parametrizations"):
            yield from ((path, name) for name, _ in module.named_parameters(recurse=False))
