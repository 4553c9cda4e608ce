"""``LoraConfig``: a frozen dataclass with the keys, defaults and meaning of PEFT's ``LoraConfig``.

A field is annotated with its check, which returns the value in an immutable type. Keys without a field are refused
if they are on, or kept as metadata.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Annotated, Any, NoReturn, Protocol, get_type_hints, runtime_checkable

from lora_ext._common.matching import EndTable, PathPatterns, as_tuple, check_expressions, layer_expressions
from lora_ext._common.messages import escaped, shown

ALL_LINEAR = "all-linear"
"""The ``target_modules`` value for every linear layer except the output head."""

# PEFT trains these heads along with the adapter, even if modules_to_save does not name them.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

# PEFT keys that never change what an adapter computes here: notes, PEFT's runtime settings, and details of an
# initialisation or variant that another key enables. Any other key without a field must be off.
_INFORMATIONAL = {
    *("auto_mapping", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
}
# Names for remarks and bookkeeping of people and tools. None is an option of PEFT 0.21.
_REMARKS = re.compile(
    r"_.*"
    r"|(.*_)?(note|comment|description|author|license|tag|date|timestamp|commit|commit_hash|url|uuid|uid)s?"
    r"|(created|updated|saved|trained)_(at|by|on|with)"
    r"|(accelerate|axolotl|datasets|diffusers|library|python|safetensors|torch|transformers|trl|unsloth)_version"
)

# Initialisations of files. The update that they begin with is zero: the base weights stay.
_KEEPS_THE_BASE = ("eva", "mica", "orthogonal")
_CHANGES_THE_BASE = re.compile("pissa(_niter_[0-9]+)?|olora|corda|lora_ga|loftq")


@runtime_checkable
class PeftConfig(Protocol):
    """A config object of PEFT, known by its methods: this module does not import PEFT."""

    peft_type: Any

    def to_dict(self) -> dict[str, Any]: ...


class FrozenDict(dict[str, Any]):
    """A dict that cannot change after construction; picklable, copyable, and hashable if its values are."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("FrozenDict: cannot be changed; build another config with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse  # type: ignore[assignment]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


# --- checks of one value, which return it in an immutable type --------------------------------------------------------

Check = Callable[[str, Any], Any]
Names = tuple[str, ...] | list[str]
Numbers = tuple[int, ...] | list[int]


def _wrong_type(key: str, value: Any, want: str) -> TypeError:
    return TypeError(f"LoraConfig: {key} is {shown(value)} of type {type(value).__name__}, want {want}")


def _value(types: Any, want: str, is_valid: Callable[[Any], bool] = lambda value: True) -> Check:
    def check(key: str, value: Any) -> Any:
        if not isinstance(value, types) or isinstance(value, bool):
            raise _wrong_type(key, value, want)
        if not is_valid(value):
            raise ValueError(f"LoraConfig: {key} is {shown(value)}, want {want}")
        return value

    return check


def _one_of(*choices: Any) -> Check:
    def check(key: str, value: Any) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            error = ValueError if type(value) in map(type, choices) else TypeError
            raise error(f"LoraConfig: {key} is {shown(value)}, want one of {', '.join(map(repr, choices))}")
        return value

    return check


def _list_of(kind: type, want: str, is_valid: Callable[[Any], bool]) -> Check:
    def check(key: str, value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple, set, frozenset)):
            raise _wrong_type(key, value, f"a list of {want}")
        for entry in value:
            if not isinstance(entry, kind) or (isinstance(entry, bool) and kind is not bool) or not is_valid(entry):
                error = ValueError if type(entry) is kind else TypeError
                raise error(f"LoraConfig: {key} has the entry {shown(entry)}, want {want}")
        return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)

    return check


def _dict_of(check: Check) -> Check:
    def check_dict(key: str, value: Any) -> FrozenDict:
        if not isinstance(value, Mapping):
            raise _wrong_type(key, value, "a dict")
        _names(key, list(value))
        return FrozenDict({name: check(f"{key}[{shown(name)}]", entry) for name, entry in value.items()})

    return check_dict


def _or_none(check: Check) -> Check:
    return lambda key, value: None if value is None else check(key, value)


_rank = _value(int, "an integer of at least 1 and below 2**31", lambda r: 1 <= r < 2**31)
_alpha = _value(int | float, "a positive finite number", lambda alpha: 0 < alpha < math.inf)
_probability = _value(int | float, "0 <= lora_dropout < 1", lambda p: 0 <= p < 1)
_flag = _one_of(True, False)
_initialisation = _one_of(True, False, "gaussian")
_names = _list_of(str, "non-empty strings", bool)
_numbers = _list_of(int, "whole numbers, at least 0", lambda number: number >= 0)
_flags = _list_of(bool, "True and False", lambda flag: True)


def _names_or_expression(key: str, value: Any) -> tuple[str, ...] | str:
    if not isinstance(value, str):
        return _names(key, value)
    check_expressions(key, [value])
    return value


def _layers_pattern(key: str, value: Any) -> tuple[str, ...] | str:
    value = _names_or_expression(key, value)
    if value:
        check_expressions(key, as_tuple(value))  # for the message
        check_expressions(key, layer_expressions(value))
    return value


def _layer_numbers(key: str, value: Any) -> tuple[int, ...] | int:
    return _numbers(key, [value])[0] if isinstance(value, int) else _numbers(key, value)


def _pattern(check: Check) -> Check:
    def check_pattern(key: str, value: Any) -> FrozenDict:
        value = _dict_of(check)(key, {} if value is None else value)  # some files have null
        check_expressions(key, value)
        return value

    return check_pattern


def _token_indices(key: str, value: Any) -> tuple[int, ...] | FrozenDict:
    if isinstance(value, Mapping):
        return _dict_of(_token_indices)(key, value)
    tokens = _numbers(key, value)
    if twice := sorted(token for token, count in Counter(tokens).items() if count > 1):
        raise ValueError(f"LoraConfig: {key} has {shown(twice)} more than once; name each token once")
    return tokens


def _parts(key: str, value: Any) -> tuple[bool, ...]:
    flags = _flags(key, value)
    if not any(flags):
        raise ValueError(f"LoraConfig: {key} is {shown(flags)}, want at least one True")
    return flags


def _metadata(key: str, value: Any) -> FrozenDict:
    return FrozenDict(_value(Mapping, "a dict")(key, value))


# --- the config -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Says which parts of a model get a low-rank adapter, and of what kind. Every key means the same as in PEFT.

    Lists may be any sequence or set and are stored as tuples; dicts are stored as :class:`FrozenDict`.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``); positive.
        lora_dropout: dropout probability on the adapter's input while training, in [0, 1).
        target_modules: a list of names, each equal to a module's path or to its end after a dot; a regular expression
            for the whole path; or ``"all-linear"``. None or empty with ``target_parameters``: no module is adapted.
        exclude_modules: modules never to adapt, matched in the same way.
        target_parameters: bare parameters to adapt (a mixture's experts), each by its path or the end after a dot.
        layers_to_transform: adapt only layers with these numbers (one or a list; an empty list means all); needs
            ``target_modules`` as a list, whose entries hold in any layer if they are whole paths. A path's layer is its
            first number with two names before it: 1 in ``model.layers.1.mlp``, none in ``layers.1.mlp``.
        layers_pattern: name (a regular expression, or a list of them) of the ``nn.ModuleList`` whose numbers
            ``layers_to_transform`` means; the first that occurs in the path decides.
        rank_pattern: other ranks for some targets, by a name or a regular expression for a path or its end after a dot;
            the first match decides.
        alpha_pattern: other values of ``lora_alpha``, in the same way.
        modules_to_save: modules to train in full and to save with the adapter: each entry matches modules whose path
            ends with it. Nothing inside them is adapted.
        trainable_token_indices: train only these rows of an embedding: token numbers for the input embedding, or a dict
            from an embedding's name (the end of its path) to such a list. A head tied to the input embedding follows
            it, unless the dict gives it other tokens.
        bias: biases to train: ``"none"``, ``"all"`` in the model, or ``"lora_only"``, those of the adapted layers.
        lora_bias: the adapter has its own bias, added after ``lora_B``.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        use_dora: also train the magnitude of each row of the weight (DoRA, arXiv 2402.09353). Linear layers only.
        fan_in_fan_out: the targets' weights are ``[in_features, out_features]``, as in Transformers' ``Conv1D``.
        init_lora_weights: True: ``lora_A`` Kaiming-uniform, ``lora_B`` zero. ``"gaussian"``: ``lora_A`` normal with
            standard deviation ``1 / r``. False: both random, for tests. Others are PEFT's (``accelerate``).
        enable_lora: for packed projections (query, key and value in one weight): maps the module's name to one bool per
            equal part, as in loralib; ``{"c_attn": (True, False, True)}`` adapts query and value. Not a PEFT key.
        task_type: None or one of PEFT's, e.g. ``"SEQ_CLS"``, whose heads join ``modules_to_save``.
        base_model_name_or_path: for the record; written to ``adapter_config.json``.
        inference_mode: inject the adapter frozen.
        metadata: keys of a PEFT file that have no effect here, written back unchanged.

    Raises:
        ValueError, TypeError: the message names the argument, its value and the accepted values.
    """

    r: Annotated[int, _rank] = 8
    lora_alpha: Annotated[float, _alpha] = 8
    lora_dropout: Annotated[float, _probability] = 0.0
    target_modules: Annotated[Names | str | None, _or_none(_names_or_expression)] = None
    exclude_modules: Annotated[Names | str | None, _or_none(_names_or_expression)] = None
    target_parameters: Annotated[Names | None, _or_none(_names)] = None
    layers_to_transform: Annotated[Numbers | int | None, _or_none(_layer_numbers)] = None
    layers_pattern: Annotated[Names | str | None, _or_none(_layers_pattern)] = None
    rank_pattern: Annotated[Mapping[str, int], _pattern(_rank)] = field(default_factory=FrozenDict)
    alpha_pattern: Annotated[Mapping[str, float], _pattern(_alpha)] = field(default_factory=FrozenDict)
    modules_to_save: Annotated[Names | None, _or_none(_names)] = None
    trainable_token_indices: Annotated[Numbers | Mapping[str, Numbers] | None, _or_none(_token_indices)] = None
    bias: Annotated[str, _one_of("none", "all", "lora_only")] = "none"
    lora_bias: Annotated[bool, _flag] = False
    use_rslora: Annotated[bool, _flag] = False
    use_dora: Annotated[bool, _flag] = False
    fan_in_fan_out: Annotated[bool, _flag] = False
    init_lora_weights: Annotated[bool | str, _initialisation] = True
    enable_lora: Annotated[Mapping[str, tuple[bool, ...] | list[bool]] | None, _or_none(_dict_of(_parts))] = None
    task_type: Annotated[str | None, _one_of(None, *TASK_HEADS)] = None
    base_model_name_or_path: Annotated[str | None, _value(str | None, "a string or None")] = None
    inference_mode: Annotated[bool, _flag] = False
    metadata: Annotated[Mapping[str, Any], _metadata] = field(default_factory=FrozenDict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for key, check in _CHECKS.items():
            object.__setattr__(self, key, check(key, getattr(self, key)))
        object.__setattr__(self, "_ranks", PathPatterns("rank_pattern", self.rank_pattern))
        object.__setattr__(self, "_alphas", PathPatterns("alpha_pattern", self.alpha_pattern))
        object.__setattr__(self, "_parts", EndTable(self.enable_lora or ()))
        self._check_targets()
        if self.target_parameters:
            why = "a bare parameter's adapter knows neither input nor output"
            self._refuse_next_to("target_parameters", why, "lora_dropout", "lora_bias", "fan_in_fan_out")
        if self.use_dora:
            self._refuse_next_to("use_dora", "DoRA goes without it", "lora_bias", "target_parameters", "enable_lora")
        if self.lora_bias and not isinstance(self.init_lora_weights, bool):
            self._refuse_next_to("lora_bias", "only True and False set the bias", "init_lora_weights")

    def _refuse_next_to(self, setting: str, why: str, *keys: str) -> None:
        for key in keys:
            if value := getattr(self, key):
                raise ValueError(
                    f"LoraConfig: {setting} is set, but {key} is {shown(value)}; {why}: leave {key} at its default"
                )

    def _check_targets(self) -> None:
        targets = self.target_modules
        if not (targets or self.target_parameters):
            raise ValueError(
                f"LoraConfig: target_modules is {shown(targets)}; name the layers to adapt, e.g. "
                '["query", "value"], or "all-linear"'
            )
        if not isinstance(targets, str) and ALL_LINEAR in (targets or ()):
            raise ValueError(
                f'LoraConfig: target_modules lists "{ALL_LINEAR}", a name for PEFT; write it alone, or name the layers'
            )
        for key in ("layers_to_transform", "layers_pattern"):
            if (value := getattr(self, key)) not in (None, ()) and isinstance(targets, str):
                raise ValueError(
                    f"LoraConfig: {key} is {shown(value)}, but target_modules is {shown(targets)}; give target_modules "
                    "as a list of names, or put the layers into the regular expression"
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"LoraConfig: layers_pattern is {shown(self.layers_pattern)}, but layers_to_transform is None; "
                "set layers_to_transform to the numbers of the layers"
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
        key = self._alphas.first(path)
        return self.lora_alpha if key is None else self.alpha_pattern[key]

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
        values = {**self.metadata, **{name: _plain(getattr(self, name)) for name in names}, "peft_type": "LORA"}
        # PEFT would choose modules by the model's type for None.
        return values | {"target_modules": values["target_modules"] or []}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Reads the content of an ``adapter_config.json`` that PEFT or :meth:`to_dict` wrote.

        Keys without a field that have no effect (null, false, empty, or informational, like ``peft_version``) are kept
        as metadata. An initialisation that leaves the base weights as they are does not matter, and becomes True.

        Raises:
            ValueError: ``peft_type`` is not LORA; keys ask for unsupported features (all of them are named); or the
                initialisation has changed the base weights, so that the file's weights do not fit the original ones.
            TypeError: ``values`` is not a dict, or a value has the wrong type for its key.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"LoraConfig: the values are of type {type(values).__name__}, want a dict")
        if values.get("peft_type") != "LORA":
            kind = shown(values.get("peft_type"))
            raise ValueError(f"LoraConfig: peft_type is {kind}, want 'LORA'; other methods are not supported")
        supported = {f.name for f in fields(cls)} - {"metadata"}
        metadata = {key: value for key, value in values.items() if key not in supported and key != "peft_type"}
        _check_other_keys(metadata)
        known = {key: value for key, value in values.items() if key in supported}
        if known.get("use_dora", False) is None:  # off, as other keys of PEFT are
            del known["use_dora"]
        if "init_lora_weights" in known:
            known["init_lora_weights"] = _initialisation_of_file(known["init_lora_weights"])
        return cls(**known, metadata=metadata)

    @classmethod
    def from_peft(cls, config: PeftConfig) -> LoraConfig:
        """Converts PEFT's ``LoraConfig``, key by key.

        ValueError, TypeError: as :meth:`from_dict`; or the config asks for an initialisation from data or from the
        weight, has custom modules, or leaves the choice of modules to PEFT.
        """
        values = {key: _plain(value) for key, value in config.to_dict().items()}
        if values.get("peft_type") == "LORA":
            if getattr(config, "_custom_modules", None):
                raise ValueError("LoraConfig: custom modules, registered with the config, are not supported")
            _initialisation("init_lora_weights", _spelled_as_here(values.get("init_lora_weights", True)))
            if values.get("target_modules") is None:
                raise ValueError(
                    "LoraConfig: target_modules is None, for which PEFT adapts modules by the model's type; name the "
                    "layers to adapt, or set target_modules=[] to adapt target_parameters alone"
                )
        return cls.from_dict(values)


_CHECKS = {key: hint.__metadata__[0] for key, hint in get_type_hints(LoraConfig, include_extras=True).items()}


# --- PEFT's files -----------------------------------------------------------------------------------------------------


def _check_other_keys(values: Mapping[str, Any]) -> None:
    """Checks the keys of a config that have no field. ValueError: a key asks for an unsupported feature."""
    settings = ", ".join(
        f"{escaped(key)}={shown(value)}"
        for key, value in values.items()
        if not (key in _INFORMATIONAL or _REMARKS.fullmatch(key))
        and value is not None
        and value is not False  # not `if value`: 0 is falsy too, but a valid layer index
        and value not in ([], {}, "")
    )
    if settings:
        raise ValueError(
            f"LoraConfig: {settings[:2000]} not supported; it would change what the adapter computes. Use PEFT for it, "
            "with lora_ext.integrations.peft.accelerate, or merge it there (merge_and_unload) or convert it to plain "
            "LoRA (peft.save_as_lora); if it is only a remark, remove it from the config"
        )


def _spelled_as_here(value: Any) -> Any:
    """Returns PEFT's ``init_lora_weights`` as :class:`LoraConfig` spells it: PEFT ignores case, and None is False."""
    return False if value is None else value.lower() if isinstance(value, str) else value


def _initialisation_of_file(value: Any) -> Any:
    """Returns the ``init_lora_weights`` for a file whose config has ``value``. ValueError: it changed the base."""
    value = _spelled_as_here(value)
    if value in _KEEPS_THE_BASE:
        return True
    if isinstance(value, str) and _CHANGES_THE_BASE.fullmatch(value):
        raise ValueError(
            f"LoraConfig: init_lora_weights is {value!r}, which has changed the base weights: the adapter fits only "
            "the changed ones. Save it with PEFT as a plain adapter (save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...), where the method has it); or, if the base model is the "
            'changed one, set "init_lora_weights": true in the config'
        )
    return value


def _plain(value: Any) -> Any:
    """Converts a value to JSON types: tuples and sets to lists, mappings to dicts, an enum to its value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return [_plain(entry) for entry in value]
    return {key: _plain(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Builds a ``rank_pattern`` or ``alpha_pattern`` that gives exactly these paths their values.

    A pattern also covers paths that end with it, and the first match decides. So longer paths come first, and a path
    with the default value gets an entry only if a shorter entry would cover it.
    """
    others = EndTable(path for path, value in values.items() if value != default)
    longest_first = sorted(values, key=lambda path: path.count("."), reverse=True)
    return {re.escape(path): values[path] for path in longest_first if path in others}
