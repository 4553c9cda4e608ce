"""Parses the methods of ``compare --methods``, such as ``lora:r=16:target-modules=q,v:name=lora-qv``."""

from __future__ import annotations

import itertools
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lora_ext.methods import METHODS
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.defaults import USUAL
from lora_ext.tasks.finetune.settings import OPTION_TYPES, OWNERS, Settings, has_option

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,39}")
_NAME_RULE = "want at most 40 letters, digits and . _ + -, with a letter or digit first"
_RESERVED = "base"  # the model without a method, in tables
_VARIED = ("method", "seed")  # compare sets these itself
# Options that must be the same for all runs.
_SHARED = ("model", "data", "validation_file", "test_file", "text_column", "label_column")
_SHARED += ("validation_split", "test_split")  # otherwise accuracies would come from different texts
_SHARED += ("pooling", "trim_vocabulary")  # otherwise costs would come from different models
_SHARED += ("precision", "dtype")  # otherwise times would come from different arithmetic


@dataclass(frozen=True)
class MethodSpec:
    """A method with finetune options that apply to this method only.

    Attributes:
        text: the text that the user wrote.
        method: the name of the method, or several joined by +.
        options: fields of :class:`~lora_ext.tasks.finetune.settings.Settings` -> values.
        label: the ``name=`` in the text, or the text if it has none; used in tables, charts and directory names.
    """

    text: str
    method: str
    options: Mapping[str, Any]
    label: str

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Parses ``method`` or ``method:option=value:option=value``.

        Raises:
            TaskError: the method or an option does not exist, a value is no number, or the name is not allowed.
        """
        # A value may contain a colon, for example in a regular expression.
        method, *pairs = re.split(r":(?=[\w-]+(?:=|$))", text)
        Settings(method=method)  # an unknown method is reported before its options
        options: dict[str, Any] = {}
        label = text
        for pair in pairs:
            option, equals, value = pair.partition("=")
            option = option.replace("-", "_")
            if equals and option == "name":
                _check_name(text, method, value)
                label = value
            elif not equals or option not in OPTION_TYPES or option in _VARIED:
                raise TaskError(f"{text!r}: {pair!r} is not option=value of finetune; want e.g. r=4, or name=...")
            elif option in _SHARED:
                raise TaskError(f"{text!r}: {option} is the same for all; give --{option.replace('_', '-')}")
            elif not has_option(method, option):
                raise TaskError(f"{text!r}: {option} goes with {', '.join(OWNERS[option])}, not with {method}")
            elif option == "set":
                options[option] = extra_arguments.merged(options.get(option, ""), value)
            else:
                options[option] = _value(text, option, value)
        return cls(text, method, options, label)

    @property
    def is_named(self) -> bool:
        return self.label != self.text

    def settings(self, options: Mapping[str, Any], seed: int) -> Settings:
        """Returns the settings of a run: the spec's options, and ``options`` for the fields that the spec does not set.

        Raises:
            TaskError: a value is out of range.
        """
        common = {name: value for name, value in options.items() if has_option(self.method, name)}
        extra = extra_arguments.merged(common.get("set", ""), *extra_arguments.items(self.options.get("set", "")))
        return Settings(**{**common, **self.options, "set": extra, "method": self.method, "seed": seed})


def check_labels(settings: Sequence[tuple[MethodSpec, Settings]]) -> None:
    """Refuses one name for two methods, and one method under two names.

    Args:
        settings: pairs of a method and its settings, all with the same seed.

    Raises:
        TaskError: two methods conflict; the message has both specs.
    """
    for (first, first_settings), (second, second_settings) in itertools.combinations(settings, 2):
        if not (first.is_named or second.is_named):
            continue
        both = f"--methods: {first.text!r} and {second.text!r}"
        # File systems that ignore case would merge the directories.
        if first.label.casefold() == second.label.casefold():
            raise TaskError(f"{both} have one name, {second.label!r}; rename or remove one of them")
        if first_settings == second_settings:
            raise TaskError(
                f"{both} are the same runs under two names; give one of them, or remove one with --without "
                f"{first.label}"
            )


def check_options(specs: Sequence[MethodSpec], options: Mapping[str, Any]) -> None:
    """Refuses an option for all runs that none of the methods takes. TaskError: the message names it."""
    defaults = {field.name: (field.default, USUAL.get(field.name)) for field in fields(Settings)}
    for name, value in options.items():
        if value not in defaults[name] and not any(has_option(spec.method, name) for spec in specs):
            raise TaskError(
                f"--{name.replace('_', '-')} goes with {', '.join(OWNERS[name])}, and none of these is in --methods"
            )


def _check_name(text: str, method: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise TaskError(f"{text!r}: name is {name!r}, {_NAME_RULE}")
    if name.casefold() == _RESERVED:
        raise TaskError(f"{text!r}: name is {name!r}, which tables use for the model without a method; want another")
    if name != method and all(part in METHODS for part in name.split("+")):
        raise TaskError(f"{text!r}: name is {name!r}, which is another method; want another name")


def _value(text: str, option: str, value: str) -> Any:
    kinds = typing.get_args(OPTION_TYPES[option]) or (OPTION_TYPES[option],)
    try:
        return int(value) if int in kinds else float(value) if float in kinds else value
    except ValueError:
        raise TaskError(f"{text!r}: {option} is {value!r}, want a number") from None


def without(methods: Iterable[str], left_out: Iterable[str]) -> list[str]:
    """Returns the specs of ``methods`` except those in ``left_out``, which gives names or whole specs.

    Raises:
        TaskError: an entry of ``left_out`` matches no method, or no method remains.
    """
    specs = [MethodSpec.parse(text) for text in methods]
    left_out = set(left_out)
    for one in sorted(left_out):
        if not any(one in (spec.text, spec.label) for spec in specs):
            raise TaskError(f"--without {one}: there are {', '.join(spec.label for spec in specs)}")
    rest = [spec.text for spec in specs if not {spec.text, spec.label} & left_out]
    if not rest:
        raise TaskError(f"--without {' '.join(sorted(left_out))} leaves no method; name fewer")
    return rest
