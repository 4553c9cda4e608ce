"""Settings of a fine-tuning run: the values that must not change when the run is resumed."""

from __future__ import annotations

import json
import math
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from lora_ext.files import read_json_object
from lora_ext.methods import METHODS, option_names
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.defaults import USUAL, with_defaults
from lora_ext.tasks.finetune.pooling import check_pooling
from lora_ext.tasks.finetune.quantize import QUANTIZABLE, check_quantize
from lora_ext.tasks.shared.whole_files import write_json

SETTINGS_FILE = "settings.json"
COMPARE_FILE = "compare-settings.json"
SWEEP_FILE = "sweep-settings.json"

PRECISIONS = ("float32", "bfloat16")
"""Precision of matrix products; bfloat16 uses PyTorch's autocast. Weights, gradients and sums stay float32."""

CHECKPOINTING = ("no", "non-reentrant", "reentrant")
"""Kinds of gradient checkpointing: layers keep their inputs only and are computed again in the backward."""

DTYPES = ("float32", "bfloat16")
"""Dtypes of the checkpoint's weights. Adapters and the new head are float32 in both cases."""

SCHEDULES = {"linear": "linear", "constant": "constant_with_warmup"}
"""Learning rate after the warm-up: falls to 0, or stays constant. Values are the names in transformers."""

BEST_METRICS = ("loss", "accuracy", "macro_f1", "weighted_f1")
"""Validation scores that can choose the best epoch's weights."""

INPUTS = ("model", "data", "validation_file", "test_file")
"""Options that name an input: a file, a directory, the id of a model, or None."""


@dataclass(frozen=True)
class Settings:
    """Settings of one run. None selects the demo's model or data, or a default of the method (defaults.py).

    The other defaults were chosen by a few runs on the demo's validation texts, with seed 0 unless noted. Batches of
    32 with twice the rate did about as well, but failed to learn with seed 1. A third epoch (seed 2) did not help.
    """

    model: str | None = None
    data: str | None = None
    validation_file: str | None = None
    test_file: str | None = None
    text_column: str = "text"
    label_column: str = "label"
    validation_split: float = 0.1
    test_split: float = 0.1
    method: str = "lora"
    pooling: str | None = None
    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float = 0.1
    lora_plus_ratio: float | None = None
    target_modules: str | None = None
    modules_to_save: str | None = None
    bottleneck_size: int = 16
    drop_layers: int | None = None
    prefix_length: int = 8
    infix_length: int = 0
    epochs: float = 2.0
    batch_size: int = 16
    accumulation_steps: int = 1
    learning_rate: float | None = None
    warmup: float = 0.1
    schedule: str | None = None
    ema_decay: float | None = None
    best_metric: str | None = None
    early_stopping: int | None = None
    class_weights: str | None = None
    precision: str = "float32"
    dtype: str = "float32"
    gradient_checkpointing: str = "no"
    quantize: str | None = None
    trim_vocabulary: bool = False
    max_length: int = 128
    seed: int = 0
    set: str = ""  # name=value of TrainingArguments, joined as in a shell; see extra_arguments.py

    INPUTS: ClassVar[tuple[str, ...]] = INPUTS
    BEST_METRICS: ClassVar[tuple[str, ...]] = BEST_METRICS
    IS_CLASSIFIER: ClassVar[bool] = True

    def __post_init__(self) -> None:
        names = self.method.split("+")
        if unknown := [name for name in names if name not in METHODS]:
            raise TaskError(f"--method is {unknown[0]!r}, want one of {', '.join(METHODS)}, or several joined by +")
        check_quantize(self.quantize, self.method)
        check_pooling(self.pooling)
        for field in fields(self):
            unused = (field.default, USUAL.get(field.name))  # USUAL: in the file of a run without the option
            if getattr(self, field.name) not in unused and not has_option(self.method, field.name):
                raise TaskError(
                    f"--{field.name.replace('_', '-')} goes with {', '.join(OWNERS[field.name])}, "
                    f"not with --method {self.method}"
                )
        extra_arguments.check_names(self.set)
        for name, value in with_defaults(asdict(self), self.IS_CLASSIFIER).items():
            object.__setattr__(self, name, value)  # files and messages show the values in use
        numbers = ("epochs", "batch_size", "accumulation_steps", "learning_rate", "lora_plus_ratio", "max_length")
        for name in numbers:
            if not 0 < getattr(self, name) < math.inf:
                raise TaskError(f"--{name.replace('_', '-')} is {getattr(self, name)}, want a finite number above 0")
        known = {"precision": PRECISIONS, "schedule": SCHEDULES, "gradient_checkpointing": CHECKPOINTING}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise TaskError(f"--{name.replace('_', '-')} is {value!r}, want one of {', '.join(values)}")
        if self.dtype not in DTYPES:
            why = ": gradients in float16 underflow; bfloat16 has float32's range" if self.dtype == "float16" else ""
            raise TaskError(f"--dtype is {self.dtype!r}, want one of {', '.join(DTYPES)}{why}")
        self._check_selection()
        if not 0.0 <= self.ema_decay < 1.0:
            raise TaskError(
                f"--ema-decay is {self.ema_decay}, want 0 <= decay < 1, such as 0.99; 0 turns the average off"
            )
        if not 0 <= self.seed < 2**32:
            raise TaskError(f"--seed is {self.seed}, want 0 <= seed < 2**32")
        if not 0.0 <= self.warmup < 1.0:
            raise TaskError(f"--warmup is {self.warmup}, want 0 <= warmup < 1, as a fraction of all steps")
        for name in ("validation_file", "test_file"):
            if getattr(self, name) is not None and self.data is None:
                raise TaskError(f"--{name.replace('_', '-')} goes with --data; the demo data is split by itself")

    def _check_selection(self) -> None:
        if self.best_metric not in (None, *self.BEST_METRICS):
            raise TaskError(f"--best-metric is {self.best_metric!r}, want one of {', '.join(self.BEST_METRICS)}")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise TaskError(
                f"--early-stopping is {self.early_stopping}, want at least 1 evaluation without a better one"
            )
        if self.early_stopping is not None and self.best_metric is None:
            raise TaskError("--early-stopping goes with --best-metric, which says what has to become better")
        if self.trim_vocabulary and self.quantize is not None:
            raise TaskError(
                "--trim-vocabulary does not go with --quantize: it would write quantised weights; run once without "
                "--quantize, then name the OUT/base of that run with --model"
            )
        if self.class_weights not in (None, "balanced"):
            raise TaskError(f"--class-weights is {self.class_weights!r}, want balanced")

    def with_method(self, method: str) -> Settings:
        """Returns these settings for another method, with its defaults in place of this method's."""
        kept = {name: value for name, value in self.given().items() if has_option(method, name)}
        return Settings(**kept | {"method": method})

    def given(self) -> dict[str, Any]:
        """Returns the settings that differ from the method's defaults."""
        defaults = _defaults_with(asdict(self))
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}

    @property
    def texts_per_step(self) -> int:
        """Texts in an optimizer step: ``accumulation_steps`` batches."""
        return self.batch_size * self.accumulation_steps

    def save(self, out: Path, threads: int | None = None) -> None:
        """Writes the settings of a run and the number of threads, which changes the last bits of sums."""
        write_json(out / SETTINGS_FILE, asdict(self) | ({} if threads is None else {"threads": threads}))

    @classmethod
    def load(cls, out: Path) -> Settings:
        """Returns the settings of the run in ``out``; raises TaskError if they are missing or damaged."""
        values = _read(out, SETTINGS_FILE)
        values.pop("threads", None)
        try:
            if empty := [name for name in USUAL if name != "modules_to_save" and values.get(name, "") is None]:
                raise ValueError(f"{empty[0]} is null")  # a run saves the values in use
            return cls(**checked_options(values, option_types(cls)))
        except (TaskError, ValueError) as error:
            raise TaskError(f"--resume: {out / SETTINGS_FILE} is damaged: {error}") from error


def saved_threads(out: Path) -> int | None:
    """Returns the number of threads that the run in ``out`` was started with, or None if it is not recorded."""
    threads = _read(out, SETTINGS_FILE).get("threads")
    return threads if type(threads) is int and threads > 0 else None


def saved_task(out: Path) -> str | None:
    """Returns the task of the run in ``out``, or None if its settings name none, as a classifier's."""
    task = _read(out, SETTINGS_FILE).get("task")
    return task if isinstance(task, str) else None


def load_request(out: Path, name: str, lists: Mapping[str, type]) -> dict[str, Any]:
    """Returns the request of a comparison or sweep from the file ``name`` in ``out``.

    Args:
        lists: ``{key: type}`` for the values that are lists; the type is that of their items.

    Raises:
        TaskError: the file is missing or damaged.
    """
    request = _read(out, name)
    try:
        for key, kind in lists.items():
            if not isinstance(request.get(key), list) or any(type(item) is not kind for item in request[key]):
                raise ValueError(f"{key} is not a list of {kind.__name__}")
        for key in request.keys() - lists.keys() - {"options"}:
            if request[key] is not None and type(request[key]) is not int:
                raise ValueError(f"{key} is not an integer")
        if not isinstance(request.get("options"), dict):
            raise ValueError("options is not an object")
        request["options"] = checked_options(request["options"])
    except ValueError as error:
        raise TaskError(f"--resume: {out / name} is damaged: {error}") from error
    return request


def checked_options(values: dict[str, Any], types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns ``values`` from a file if all are fields of :class:`Settings` with the right type.

    Files of earlier releases name ``test_file`` ``eval_file``.

    Args:
        types: the fields' types, if they are of a subclass.

    Raises:
        ValueError: a name is unknown, or a value has the wrong type.
    """
    values = {"test_file" if name == "eval_file" else name: value for name, value in values.items()}
    types = OPTION_TYPES if types is None else types
    for name, value in values.items():
        if name not in types:
            raise ValueError(f"{name!r} is not an option")
        kinds = typing.get_args(types[name]) or (types[name],)
        if (
            type(value) not in kinds
            and not (float in kinds and type(value) is int)
            and not (name == "learning_rate" and value is None)
        ):
            raise ValueError(f"{name} is {json.dumps(value)[:100]}")
    return values


def _read(out: Path, name: str) -> dict[str, Any]:
    path = out / name
    try:
        return read_json_object(path, "", 1_000_000)
    except FileNotFoundError as error:
        raise TaskError(
            f"--resume: {out} holds no run to continue: there is no {name}; start it without --resume"
        ) from error
    except OSError as error:
        raise TaskError(f"--resume: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TaskError(f"--resume: {error}") from error


def option_types(kind: type[Settings]) -> dict[str, Any]:
    """Returns ``{name: type}`` of the settings."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind)}


OPTION_TYPES = option_types(Settings)

OWNERS = {
    field.name: [name for name in METHODS if field.name in option_names(name)]
    for field in fields(Settings)
    if any(field.name in option_names(name) for name in METHODS)
} | {"lora_plus_ratio": ["lora"], "quantize": list(QUANTIZABLE)}
"""``{option: methods}`` for the options that only some methods support."""


def has_option(method: str, option: str) -> bool:
    """Returns whether an option of finetune affects ``method``, or one of the methods that it joins by +."""
    return option not in OWNERS or not set(OWNERS[option]).isdisjoint(method.split("+"))


def command_line(command: str, options: Mapping[str, Any], out: Path, *first: str) -> list[str]:
    """Returns the command that repeats a run: ``first``, then the ``options`` that differ from the defaults."""
    return ["lora-ext", command, *first, *option_list(options), "--out", str(out)]


def _defaults_with(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a run with the method of ``options`` takes for options that are left out.

    Without ``target_modules`` if the other defaults go with the layers named there.
    """
    about = {name: options.get(name) for name in ("method", "quantize")}
    defaults, targets = asdict(Settings(**about)) | {"quantize": None}, options.get("target_modules")
    saves_less = defaults["modules_to_save"] is not None and options.get("modules_to_save") is None
    if targets is None or (targets == defaults["target_modules"] and not saves_less):
        return defaults
    return asdict(Settings(**about, target_modules=targets)) | {"quantize": None, "target_modules": None}


def option_list(options: Mapping[str, Any]) -> list[str]:
    """Returns the ``options`` that differ from the defaults, as the command line has them."""
    if "method" in options:
        defaults = _defaults_with(options) | {"method": Settings.method}
    else:  # several methods, each with its defaults
        defaults = {field.name: field.default for field in fields(Settings)}
    changed = {name: value for name, value in options.items() if value is not None and value != defaults.get(name)}
    extra = [part for item in extra_arguments.items(changed.pop("set", "")) for part in ("--set", item)]
    flags = [f"--{name.replace('_', '-')}" for name, value in changed.items() if value is True]
    valued = {name: value for name, value in changed.items() if value is not True}
    given = [part for name, value in valued.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return given + flags + extra
