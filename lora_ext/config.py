"""What to adapt, and how: a frozen dataclass with the keys, defaults and meaning of PEFT's ``LoraConfig``."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"
"""The ``target_modules`` that stands for every linear layer but the output head."""

# PEFT trains these heads along with the adapter, whatever modules_to_save says.
_TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "CAUSAL_LM": (),
    "SEQ_2_SEQ_LM": (),
    "FEATURE_EXTRACTION": (),
}

# Keys PEFT writes that never change what a plain LoRA adapter computes. Any other key without a field here must be off.
_INFORMATIONAL = frozenset(
    {"auto_mapping", "peft_version", "revision", "megatron_core", "qalora_group_size", "loftq_config", "runtime_config"}
)


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which layers get a low-rank adapter, and of what kind. Means what ``peft.LoraConfig`` means.

    Args:
        r: rank of the update, at least 1.
        lora_alpha: the update is scaled by ``lora_alpha / r`` (``lora_alpha / sqrt(r)`` with ``use_rslora``); positive.
        lora_dropout: dropout probability on the adapter's input while training, in [0, 1).
        target_modules: which ``nn.Linear`` to adapt: a list of names, each matching a module's whole path or the end of
            it after a dot; or a regular expression that matches the whole path; or ``"all-linear"``.
        exclude_modules: never adapt these; a list or a regular expression, matched in the same way.
        modules_to_save: modules to train in full and to save with the adapter (a new classification head): each entry
            matches a module whose path ends with it. Nothing inside them is adapted.
        bias: only ``"none"``: biases stay frozen.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        fan_in_fan_out: only False: weights are ``[out_features, in_features]``, as in ``nn.Linear``.
        init_lora_weights: True (``lora_A`` Kaiming-uniform, ``lora_B`` zero), ``"gaussian"`` (``lora_A`` normal), or
            False (both random, so that the adapter changes the output at once: for tests).
        task_type: None or one of PEFT's, e.g. ``"SEQ_CLS"``, which adds the heads "classifier" and "score" to
            ``modules_to_save``.
        base_model_name_or_path: for the record; written to ``adapter_config.json``.
        inference_mode: inject the adapter frozen.
        metadata: keys of a PEFT file without effect here, kept so that they are written back unchanged.

    Raises:
        ValueError, TypeError: naming the argument, its value and what is wanted.
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | list[str] | str | None = None
    exclude_modules: tuple[str, ...] | list[str] | str | None = None
    modules_to_save: tuple[str, ...] | list[str] | None = None
    bias: str = "none"
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    init_lora_weights: bool | str = True
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_number("r", self.r, (int,), lambda r: r >= 1, "an integer of at least 1")
        _check_number(
            "lora_alpha", self.lora_alpha, (int, float), lambda alpha: 0 < alpha < math.inf, "a positive finite number"
        )
        _check_number("lora_dropout", self.lora_dropout, (int, float), lambda p: 0 <= p < 1, "0 <= lora_dropout < 1")
        for key in ("use_rslora", "fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, key), bool):
                raise TypeError(f"LoraConfig: {key} is {getattr(self, key)!r}, want True or False")

        if self.target_modules is None:
            raise ValueError(
                'LoraConfig: target_modules is None; name the layers to adapt, e.g. ["query", "value"], or "all-linear"'
            )
        object.__setattr__(self, "target_modules", _names("target_modules", self.target_modules, may_be_regex=True))
        object.__setattr__(self, "exclude_modules", _names("exclude_modules", self.exclude_modules, may_be_regex=True))
        object.__setattr__(self, "modules_to_save", _names("modules_to_save", self.modules_to_save, may_be_regex=False))
        if not self.target_modules:
            raise ValueError('LoraConfig: target_modules is empty; name at least one layer, or use "all-linear"')

        if self.bias != "none":
            raise ValueError(f'LoraConfig: bias is {self.bias!r}; only bias="none" is supported')
        if self.fan_in_fan_out:
            raise ValueError(
                "LoraConfig: fan_in_fan_out is True, which is for Conv1D layers; only nn.Linear is supported (False)"
            )
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ValueError(
                f'LoraConfig: init_lora_weights is {self.init_lora_weights!r}, want True, False or "gaussian"'
            )
        if self.task_type is not None and self.task_type not in _TASK_HEADS:
            raise ValueError(
                f"LoraConfig: task_type is {self.task_type!r}, want None or one of {', '.join(sorted(_TASK_HEADS))}"
            )

    @property
    def task_heads(self) -> tuple[str, ...]:
        """Heads that ``task_type`` adds to ``modules_to_save``, where the model has them."""
        return _TASK_HEADS[self.task_type] if self.task_type is not None else ()

    @property
    def trained_modules(self) -> tuple[str, ...]:
        """``modules_to_save`` and the heads of ``task_type``."""
        return (*(self.modules_to_save or ()), *self.task_heads)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``adapter_config.json``: PEFT's keys, lists for tuples, unsupported keys as they were read."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "metadata"}
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
        return {**self.metadata, **own, "peft_type": "LORA"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoraConfig:
        """Reads the content of an ``adapter_config.json`` that PEFT or :meth:`to_dict` wrote.

        Keys without a field here are kept as metadata where they have no effect (null, false, empty, or merely
        informational, like ``peft_version``).

        Raises:
            ValueError: ``peft_type`` is not LORA, or a key asks for something that is not supported; names all of them.
        """
        if values.get("peft_type") != "LORA":
            raise ValueError(
                f"LoraConfig: peft_type is {values.get('peft_type')!r}, want 'LORA'; other adaptation methods are not "
                "supported"
            )
        own = {f.name for f in fields(cls)} - {"metadata"}
        metadata = {key: value for key, value in values.items() if key not in own and key != "peft_type"}
        # Not `if value`: 0 is falsy too, but as a layer index it means something.
        unsupported = {
            key: value
            for key, value in metadata.items()
            if key not in _INFORMATIONAL and not (value is None or value is False or value in ([], {}, ""))
        }
        if unsupported:
            settings = ", ".join(f"{key}={value!r}" for key, value in unsupported.items())
            raise ValueError(f"LoraConfig: {settings} not supported; it would change what the adapter computes")
        return cls(**{key: value for key, value in values.items() if key in own}, metadata=metadata)


def _check_number(key: str, value: Any, types: tuple[type, ...], is_valid: Callable[[Any], bool], want: str) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        raise TypeError(f"LoraConfig: {key} is {value!r} of type {type(value).__name__}, want {want}")
    if not is_valid(value):
        raise ValueError(f"LoraConfig: {key} is {value}, want {want}")


def _names(key: str, value: Any, *, may_be_regex: bool) -> tuple[str, ...] | str | None:
    """Checks a list of module names, or a regular expression where allowed; returns a tuple or the expression."""
    if value is None:
        return None
    if isinstance(value, str):
        if not may_be_regex:
            raise TypeError(f"LoraConfig: {key} is the string {value!r}, want a list of module names: [{value!r}]")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"LoraConfig: {key} is {value!r}, not a regular expression: {error}") from error
        return value
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise TypeError(f"LoraConfig: {key} is {value!r} of type {type(value).__name__}, want a list of module names")
    for name in value:
        if not isinstance(name, str) or not name:
            raise TypeError(f"LoraConfig: {key} has the entry {name!r}, want non-empty strings")
    return tuple(sorted(value)) if isinstance(value, (set, frozenset)) else tuple(value)
