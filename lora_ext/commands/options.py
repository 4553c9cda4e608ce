"""Errors of one line with exit status 2, and the parser that raises them; all commands use them."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from lora_ext._common.messages import install_hint, suggestion

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # no mistakes of the user: main ends with status 1
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16")}


class CommandError(Exception):
    """A mistake that the user can correct. :func:`lora_ext.commands.main` prints it as one line; exit status 2."""


@contextmanager
def refusing(what: str, *more: type[Exception]) -> Iterator[None]:
    """Turns the errors by which libraries refuse a file, a model or an option into a CommandError of one line.

    Args:
        what: the option at fault, for the beginning of the line; "": the error says it.
        more: classes of errors next to OSError, ValueError and ImportError. Others are bugs and keep their traceback.
    """
    try:
        yield
    except (OSError, ValueError, ImportError, *more) as error:
        if isinstance(error, BrokenPipeError) or (isinstance(error, OSError) and error.errno in DISK_ERRORS):
            raise
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{error.filename}: {error.strerror}"
        else:
            text = str(error.args[0] if isinstance(error, KeyError) and error.args else error).strip()
        line = _one_line(text or type(error).__name__)
        raise CommandError(f"{what}: {line}" if what else line) from error


def _one_line(text: str) -> str:
    """Returns the first line; if it announces a list, also the list's beginning and the line after the list."""
    first, *more = text.splitlines()
    if not first.endswith(":"):
        return first
    items = [line.strip() for line in more if line.startswith((" ", "\t"))]
    left_out = [f"and {len(items) - 3:,} more"] if len(items) > 3 else []
    after = [line for line in more if not line.startswith((" ", "\t"))][:1]
    return f"{first} {'; '.join([*items[:3], *left_out, *after])}"


def check_installed(extra: str, *names: str) -> None:
    """Raises CommandError if a package that the command needs is missing; the message says how to install it."""
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise CommandError(f"this needs {', '.join(missing)}: {install_hint(extra)}")


def is_first_process() -> bool:
    """Returns whether this is the process of torchrun that prints and writes, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """Raises CommandError instead of printing the usage, which can be hundreds of lines; suggests similar options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, "formatter_class": HelpFormatter} | kwargs)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        self.refuse_unknown(unknown)
        return parsed

    def refuse_unknown(self, unknown: Sequence[str]) -> None:
        """Raises CommandError for the first argument that no option takes."""
        if not unknown:
            return
        name = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
        raise CommandError(f"there is no option {name}{suggestion(name, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        raise CommandError(message)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints defaults, except None, True, False and empty ones."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is True or action.default in (None, False, "", [])
        return action.help if says_nothing or not action.option_strings else super()._get_help_string(action)


def names_of(text: str) -> list[str]:
    """Splits ``query,value`` into names."""
    return [name.strip() for name in text.split(",") if name.strip()]


def size(text: str) -> int:
    """Parses a size such as ``5GB`` or ``500MiB`` into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, want a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def dtype(text: str) -> torch.dtype:
    """Parses PyTorch's name of a floating-point dtype."""
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r}, want one of {', '.join(_DTYPES)}")
    return _DTYPES[text]
