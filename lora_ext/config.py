"""``LoraConfig``: a frozen dataclass with the keys, defaults and meaning of PEFT's ``LoraConfig``."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

from lora_ext._common.printable import shown
from lora_ext._common.suggestion import suggestion
from lora_ext._config_keys import check_other_keys, initialisation, initialisation_of_file
from lora_ext._config_values import (
    FrozenDict,
    check_alpha,
    check_number,
    check_rank,
    enabled_parts,
    invocation_tokens,
    layer_numbers,
    names,
    pattern,
    plain,
    thaw,
    token_indices,
)
from lora_ext.matching.bounded_regex import check_expressions
from lora_ext.matching.path_names import EndTable
from lora_ext.matching.path_patterns import PathPatterns, as_tuple, layer_expressions

ALL_LINEAR = "all-linear"
"""The ``target_modules`` value for every linear layer except the output head."""

# Words that other libraries and users have for fields, where no close match finds them.
_OTHER_WORDS = {
    "rank": "r",
    "lora_r": "r",
    "lora_rank": "r",
    "scale": "lora_alpha",
    "targets": "target_modules",
    "modules": "target_modules",
    "dora": "use_dora",
    "rslora": "use_rslora",
}

# PEFT trains these heads along with the adapter, even if modules_to_save does not name them.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}


@runtime_checkable
class PeftConfig(Protocol):
    """A config object of PEFT, known by its methods: this module does not import PEFT."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Says which parts of a model get a low-rank adapter, and of what kind. Every key means the same as in PEFT.

    Lists may be any sequence or set and are stored as tuples; dicts are stored as :class:`FrozenDict`.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``); positive.
        lora_dropout: dropout probability on the adapter's input while training, in [0, 1).
        target_modules: the modules to adapt: a list of names, each equal to a module's path or to its end after a dot;
            a regular expression for the whole path; or ``"all-linear"``, alone or in a list (PEFT takes it alone).
            May be None or empty with ``target_parameters`` (for None PEFT chooses by model type; here no module is
            adapted).
        exclude_modules: modules never to adapt; a list or a regular expression, matched in the same way.
        target_parameters: bare ``nn.Parameter`` objects to adapt (the experts of a mixture): names of the form
            ``module.parameter``, each equal to a parameter's path or to its end after a dot.
        layers_to_transform: adapt only layers with these numbers (one or a list; an empty list means all); needs
            ``target_modules`` as a list. A path's layer is its first number with two names before it: 1 in
            ``model.layers.1.mlp``, none in ``layers.1.mlp``, which is then not adapted. An entry of ``target_modules``
            that is a module's whole path holds in any layer.
        layers_pattern: name (a regular expression, or a list of them) of the ``nn.ModuleList`` whose numbers
            ``layers_to_transform`` means, such as ``"layers"`` or ``"h"``; the first that occurs in the path decides.
        rank_pattern: other ranks for some targets: maps a regular expression, for a path or its end after a dot, to a
            rank; the first match decides.
        alpha_pattern: the same for ``lora_alpha``.
        modules_to_save: modules to train in full and to save with the adapter (a new classification head): each entry
            matches modules whose path ends with it. Nothing inside them is adapted.
        trainable_token_indices: train only these rows of an embedding: a list of token numbers for the model's input
            embedding, or a dict from an embedding's name (the end of its path) to such a list. A head tied to the input
            embedding follows it, unless the dict gives it other tokens.
        ensure_weight_tying: modules that share the input embedding's weight (a tied head) follow the embedding: if
            ``target_modules`` or ``modules_to_save`` names one of them, all get one common adapter or copy. If False,
            each named module gets a separate one, and merging it is refused, as that would change the others.
        bias: biases to train: ``"none"``, ``"all"`` in the model, or ``"lora_only"``, those of the adapted layers.
        lora_bias: the adapter has its own bias, added after ``lora_B``.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        use_dora: also train the magnitude of each row of the weight (DoRA, arXiv 2402.09353). Linear layers only.
        fan_in_fan_out: the targets' weights are ``[in_features, out_features]``, as in Transformers' ``Conv1D``.
        init_lora_weights: True: ``lora_A`` Kaiming-uniform, ``lora_B`` zero. ``"gaussian"``: ``lora_A`` normal with
            standard deviation ``1 / r``. ``"orthogonal"``: rows of ``lora_A`` and columns of ``lora_B`` from the two
            halves of a random rotation, so that their product is zero; even ranks. False: both random, so that the
            adapter changes the output at once (for tests).
        enable_lora: for packed projections (query, key and value in one weight): maps the module's name (matched as in
            ``target_modules``) to one bool per equal part, as in loralib; ``{"c_attn": (True, False, True)}`` adapts
            query and value. Parts that are off cost nothing. Not a PEFT key: :meth:`to_dict` leaves it out.
        alora_invocation_tokens: makes the adapter an aLoRA (arXiv 2504.12397), which PEFT computes;
            :func:`lora_ext.inject` refuses it, and :func:`lora_ext.integrations.peft.accelerate` runs it.
        task_type: None or one of PEFT's, e.g. ``"SEQ_CLS"``, which adds the heads "classifier" and "score" to
            ``modules_to_save``.
        base_model_name_or_path: for the record; written to ``adapter_config.json``.
        inference_mode: inject the adapter frozen.
        metadata: keys of a PEFT file that have no effect here, written back unchanged.

    Raises:
        ValueError, TypeError: the message names the argument, its value and the accepted values.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | list[str] | str | None = None
    exclude_modules: tuple[str, ...] | list[str] | str | None = None
    target_parameters: tuple[str, ...] | list[str] | None = None
    layers_to_transform: tuple[int, ...] | list[int] | int | None = None
    layers_pattern: tuple[str, ...] | list[str] | str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=FrozenDict)
    alpha_pattern: Mapping[str, float] = field(default_factory=FrozenDict)
    modules_to_save: tuple[str, ...] | list[str] | None = None
    trainable_token_indices: tuple[int, ...] | list[int] | Mapping[str, tuple[int, ...] | list[int]] | None = None
    ensure_weight_tying: bool = False
    bias: str = "none"
    lora_bias: bool = False
    use_rslora: bool = False
    use_dora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    enable_lora: Mapping[str, tuple[bool, ...] | list[bool]] | None = None
    alora_invocation_tokens: tuple[int, ...] | list[int] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    metadata: Mapping[str, Any] = field(default_factory=FrozenDict, compare=False, repr=False)

    def __new__(cls, **values: Any) -> LoraConfig:
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                meant = suggestion(_OTHER_WORDS.get(name, name), known)
                raise TypeError(f"LoraConfig: there is no option {shown(name)}{meant}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_types()
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_number("lora_dropout", self.lora_dropout, (int, float), lambda p: 0 <= p < 1, "0 <= lora_dropout < 1")
        for key in ("use_rslora", "use_dora", "fan_in_fan_out", "inference_mode", "lora_bias", "ensure_weight_tying"):
            if not isinstance(getattr(self, key), bool):
                raise TypeError(f"LoraConfig: {key} is {shown(getattr(self, key))}, want True or False")
        if not isinstance(self.bias, str) or self.bias not in ("none", "all", "lora_only"):
            raise ValueError(f'LoraConfig: bias is {shown(self.bias)}, want "none", "all" or "lora_only"')
        if self.task_type is not None and not (isinstance(self.task_type, str) and self.task_type in TASK_HEADS):
            raise ValueError(
                f"LoraConfig: task_type is {shown(self.task_type)}, want None or one of {', '.join(sorted(TASK_HEADS))}"
            )
        self._freeze_values()
        self._check_targets()
        self._check_initialisation()
        self._check_dora()

    def _check_types(self) -> None:
        """Checks the types of the fields that no later check covers."""
        for key, types, want in (
            ("init_lora_weights", (str, int), "True, False or a string"),
            ("base_model_name_or_path", (str, type(None)), "a string or None"),
            ("metadata", Mapping, "a dict"),
        ):
            value = getattr(self, key)
            if not isinstance(value, types):
                raise TypeError(f"LoraConfig: {key} is of type {type(value).__name__}, want {want}")

    def _freeze_values(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        for key in ("target_modules", "exclude_modules", "layers_pattern"):
            set_(key, names(key, getattr(self, key), may_be_regex=True))
        for key in ("modules_to_save", "target_parameters"):
            set_(key, names(key, getattr(self, key), may_be_regex=False))
        if self.layers_pattern:
            check_expressions("layers_pattern", as_tuple(self.layers_pattern))  # for the message
            check_expressions("layers_pattern", layer_expressions(self.layers_pattern))
        set_("layers_to_transform", layer_numbers(self.layers_to_transform))
        set_("rank_pattern", pattern("rank_pattern", self.rank_pattern, check_rank))
        set_("alpha_pattern", pattern("alpha_pattern", self.alpha_pattern, check_alpha))
        set_("trainable_token_indices", token_indices(self.trainable_token_indices))
        set_("enable_lora", enabled_parts(self.enable_lora))
        set_("alora_invocation_tokens", invocation_tokens(self.alora_invocation_tokens))
        set_("metadata", FrozenDict(self.metadata))
        set_("_ranks", PathPatterns("rank_pattern", self.rank_pattern))
        set_("_alphas", PathPatterns("alpha_pattern", self.alpha_pattern))
        set_("_parts", EndTable(self.enable_lora or ()))

    def _check_targets(self) -> None:
        if self.target_modules is None and not self.target_parameters:
            raise ValueError(
                'LoraConfig: target_modules is None; name the layers to adapt, e.g. ["query", "value"], or "all-linear"'
            )
        if not self.target_modules and not self.target_parameters:
            raise ValueError('LoraConfig: target_modules is empty; name at least one layer, or use "all-linear"')
        for key in ("layers_to_transform", "layers_pattern"):
            value = getattr(self, key)
            listed = () if isinstance(self.target_modules, str) else self.target_modules or ()
            if ALL_LINEAR in listed and value not in (None, ()):
                raise ValueError(
                    f'LoraConfig: {key} is {shown(value)}, but target_modules has "all-linear", which means layers of '
                    "any number; name the layers instead"
                )
            if isinstance(self.target_modules, str) and value not in (None, ()):
                raise ValueError(
                    f"LoraConfig: {key} is {shown(value)}, but target_modules is the string "
                    f"{shown(self.target_modules)}; give target_modules as a list of names, or put the layers into the "
                    "regular expression"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"LoraConfig: layers_pattern is {shown(self.layers_pattern)}, but layers_to_transform is None; "
                "set layers_to_transform to the numbers of the layers"
            )
        if self.target_parameters:
            for key in ("lora_dropout", "lora_bias", "fan_in_fan_out"):
                if getattr(self, key):
                    raise ValueError(
                        f"LoraConfig: {key} is {getattr(self, key)}, but target_parameters is set: a bare parameter's "
                        f"adapter knows only the weight, not the input or output; leave {key} at its default"
                    )

    @staticmethod
    def _check_initialisation_value(value: object) -> None:
        if not isinstance(value, bool) and value not in ("gaussian", "orthogonal"):
            raise ValueError(
                f'LoraConfig: init_lora_weights is {shown(value)}, want True, False, "gaussian" or "orthogonal"'
            )

    def _check_initialisation(self) -> None:
        self._check_initialisation_value(self.init_lora_weights)
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            raise ValueError(
                f"LoraConfig: lora_bias is True, but init_lora_weights is {self.init_lora_weights!r}; "
                "lora_bias goes with init_lora_weights True or False only"
            )
        if self.init_lora_weights == "orthogonal":
            ranks = {"r": self.r} | {f"rank_pattern[{shown(key)}]": rank for key, rank in self.rank_pattern.items()}
            for key, rank in ranks.items():
                if rank % 2:
                    raise ValueError(
                        f'LoraConfig: {key} is {rank}, but init_lora_weights="orthogonal" needs an even rank'
                    )

    def _check_dora(self) -> None:
        if not self.use_dora:
            return
        others = "lora_bias", "ensure_weight_tying", "target_parameters", "enable_lora"
        for key in others:
            if getattr(self, key):
                raise ValueError(
                    f"LoraConfig: use_dora is True, but {key} is {shown(getattr(self, key))}; DoRA goes without it: "
                    f"leave {key} at its default"
                )

    @property
    def task_heads(self) -> tuple[str, ...]:
        """Heads that ``task_type`` adds to ``modules_to_save`` if the model has them."""
        return TASK_HEADS[self.task_type] if self.task_type is not None else ()

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """``modules_to_save`` and the heads of ``task_type``."""
        return (*(self.modules_to_save or ()), *self.task_heads)

    def rank_for(self, path: str) -> int:
        """The rank at ``path``, the path of a module or of a target parameter (``module.parameter``)."""
        key = self._ranks.first(path)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_for(self, path: str) -> float:
        """``lora_alpha`` at ``path``."""
        key = self.alpha_pattern_for(path)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def alpha_pattern_for(self, path: str) -> str | None:
        """The entry of ``alpha_pattern`` that decides at ``path``, or None."""
        return self._alphas.first(path)

    def scaling_for(self, path: str) -> float:
        """The factor of the update at ``path``: ``alpha / r``, or ``alpha / sqrt(r)`` with ``use_rslora``."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (math.sqrt(rank) if self.use_rslora else rank)

    def enable_lora_for(self, path: str) -> tuple[bool, ...] | None:
        """Returns a flag for every part of the packed projection at ``path``: has it an adapter? None if not packed."""
        names = self._parts.find(path)
        return self.enable_lora[names[0]] if names else None

    def unused_settings(self, paths: Iterable[str]) -> dict[str, list[str]]:
        """Maps each key to the entries of its pattern (or of ``enable_lora``) that cover none of ``paths``."""
        paths = list(paths)
        used = {name for path in paths for name in self._parts.find(path)}
        return {
            "rank_pattern": self._ranks.unused(paths),
            "alpha_pattern": self._alphas.unused(paths),
            "enable_lora": [name for name in self.enable_lora or () if name not in used],
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``: PEFT's keys, tuples as lists, unsupported keys as they were read."""
        names = [f.name for f in fields(self) if f.name not in ("metadata", "enable_lora")]
        values = {**self.metadata, **{name: thaw(getattr(self, name)) for name in names}, "peft_type": "LORA"}
        # PEFT would choose modules by the model's type for None.
        return values | {"target_modules": values["target_modules"] or []}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Reads the content of an ``adapter_config.json`` that PEFT or :meth:`to_dict` wrote.

        Keys without a field that have no effect (null, false, empty, or informational, like ``peft_version``) are kept
        as metadata. An initialisation that leaves the base weights as they are (``"eva"``, ``"mica"``) does not matter
        for weights that are in a file, and becomes True.

        Raises:
            ValueError: ``peft_type`` is not LORA; keys ask for unsupported features (all of them are named); or the
                initialisation has changed the base weights, so that the file's weights do not fit the original ones.
            TypeError: ``values`` is not a dict, or a value has the wrong type for its key.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"LoraConfig: the values are of type {type(values).__name__}, want a dict")
        if values.get("peft_type") != "LORA":
            kind = shown(values.get("peft_type"))
            raise ValueError(
                f"LoraConfig: peft_type is {kind}, want 'LORA'; other adaptation methods are not supported"
            )
        supported = {f.name for f in fields(cls)} - {"metadata"}
        metadata = {key: value for key, value in values.items() if key not in supported and key != "peft_type"}
        check_other_keys(metadata)
        known = {key: value for key, value in values.items() if key in supported}
        if known.get("use_dora", False) is None:  # off, as other keys of PEFT are
            del known["use_dora"]
        if "init_lora_weights" in known:
            known["init_lora_weights"] = initialisation_of_file(known["init_lora_weights"])
        return cls(**known, metadata=metadata)

    @classmethod
    def from_peft(cls, config: PeftConfig) -> LoraConfig:
        """Converts PEFT's ``LoraConfig``, key by key.

        Raises:
            ValueError, TypeError: as :meth:`from_dict`; or the config asks for an initialisation from data or from the
                weight, has custom modules, or leaves the choice of modules next to ``target_parameters`` to PEFT.
        """
        values = {key: plain(value) for key, value in config.to_dict().items()}
        if values.get("peft_type") == "LORA":
            if getattr(config, "_custom_modules", None):
                raise ValueError("LoraConfig: custom modules, registered with the config, are not supported")
            cls._check_initialisation_value(initialisation(values.get("init_lora_weights", True)))
            if values.get("target_modules") is None and values.get("target_parameters"):
                raise ValueError(
                    "LoraConfig: target_modules is None, for which PEFT adapts modules by the model's type, next to "
                    "target_parameters; name them, or set target_modules=[] to adapt none"
                )
        return cls.from_dict(values)


def exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Builds a ``rank_pattern`` or ``alpha_pattern`` that gives exactly these paths their values.

    A pattern also covers paths that end with it, and the first match decides. So longer paths come first, and a path
    with the default value gets an entry only if a shorter entry would cover it.
    """
    others = EndTable(path for path, value in values.items() if value != default)
    longest_first = sorted(values, key=lambda path: path.count("."), reverse=True)
    return {re.escape(path): values[path] for path in longest_first if path in others}
