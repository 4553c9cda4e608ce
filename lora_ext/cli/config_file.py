"""``--config run.yaml``: options of a command from a YAML file; options on the command line win."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_ext._common.install_hint import install_hint
from lora_ext.tasks import TaskError

_MOST_BYTES = 1_000_000
_LISTS_OF_NAMES = ("target-modules", "modules-to-save")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$")
_NOT_IN_A_FILE = ("help", "config", "resume", "overwrite")  # they are about one call, not about the run


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.yaml",
        help="these options, by name, and under 'set:' names and values; options on the command line win",
    )


def with_config(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """Puts the options of the file that ``--config`` names before the ``arguments`` of a command.

    Args:
        parser: the command's parser.
        arguments: what follows the command's name.

    Raises:
        TaskError: the file cannot be read or is no YAML, a key is not an option, or a value is none of the option's.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", type=Path)
    path = finder.parse_known_args(arguments)[0].config
    if path is None or not any(action.dest == "config" for action in parser._actions):
        return list(arguments)
    options = {action.option_strings[0].removeprefix("--"): action for action in parser._actions}
    for name in _NOT_IN_A_FILE:
        options.pop(name, None)
    options = {option: action for option, action in options.items() if not option.startswith("-")}
    given, seen = [], set()
    for key, value in _read(path).items():
        option = str(key).replace("_", "-")
        if option in seen:
            raise TaskError(f"--config {path}: {option} occurs twice, with - and with _")
        seen.add(option)
        if option not in options:
            close = difflib.get_close_matches(option, options)
            raise TaskError(
                f"--config {path}: {key!r} is not an option"
                + (f"; close matches: {', '.join(map(repr, close))}" if close else "")
            )
        given += _as_arguments(path, option, options[option], value)
    return [*given, *arguments]


def _as_arguments(path: Path, option: str, action: argparse.Action, value: Any) -> list[str]:
    """Returns what the command line would have; checks it by the action's type."""
    name = f"--{option}"
    if value is None:
        raise TaskError(f"--config {path}: {option} has no value; remove the line for the default")
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise TaskError(f"--config {path}: {option} is {value!r}, want true or false")
        return [name] if value else []
    if option in ("set", "launcher-set"):
        if not isinstance(value, dict):
            raise TaskError(f"--config {path}: {option} is {value!r}, want names and values below it")
        return [part for key, one in value.items() for part in (name, f"{key}={_text(one)}")]
    if action.nargs == "+":
        values = [_text(one) for one in (value if isinstance(value, list) else [value])]
        return [name, *values]
    if isinstance(value, dict) or (isinstance(value, list) and action.type is None and option not in _LISTS_OF_NAMES):
        raise TaskError(f"--config {path}: {option} is {value!r}, want one value")
    if action.nargs == "?" and isinstance(value, bool):  # --gradient-checkpointing, whose value can be left out
        return [name] if value else []
    if isinstance(value, bool) and action.type is None:
        raise TaskError(f"--config {path}: {option} is {_text(value)}, want text; put yes, no, on and off in quotes")
    text = ",".join(map(_text, value)) if isinstance(value, list) else _text(value)
    try:
        (action.type or str)(text)
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        kind = getattr(action.type, "__name__", "")
        reason = error if isinstance(error, argparse.ArgumentTypeError) else f"want {kind}"
        raise TaskError(f"--config {path}: {option} is {text!r}: {reason}") from error
    return [f"{name}={text}"]


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, dict | list):
        return json.dumps(_as_json(value))
    return str(value)


class _Number(str):
    """A number as it is written: ``model: 1.10`` is no 1.1, and YAML 1.1 reads 1:30 as 90 and 010 as 8."""

    __repr__ = str.__str__


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_as_json(one) for one in value]
    if isinstance(value, _Number):
        return int(value) if value.lstrip("+-").isdecimal() else float(value)
    return value


def _read(path: Path) -> dict[Any, Any]:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise TaskError(f"--config needs PyYAML: {install_hint('finetune')}") from error

    class Loader(yaml.SafeLoader):
        """Refuses a key that occurs twice, and reads decimal numbers only."""

        yaml_implicit_resolvers = {  # noqa: RUF012
            first: [(tag, how) for tag, how in found if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
            for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value]
            if twice := [key for key in keys if isinstance(key, str) and keys.count(key) > 1]:
                line = node.start_mark.line + 1
                raise yaml.YAMLError(f"{twice[0]!r} occurs {keys.count(twice[0])} times below line {line}")
            return super().construct_mapping(node, deep)

    Loader.add_implicit_resolver("!number", _NUMBER, list("+-.0123456789"))
    Loader.add_constructor("!number", lambda loader, node: _Number(node.value))
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise TaskError(f"--config {path}: larger than {_MOST_BYTES:,} bytes")
        options = yaml.load(content, Loader)
    except OSError as error:
        raise TaskError(f"--config {path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise TaskError(f"--config {path}: no YAML: {' '.join(str(error).split())}") from error
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TaskError(f"--config {path}: holds no options, such as 'epochs: 3'")
    return options
