"""Shared by the commands on files: options, errors, output."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_ext._common.printable import escaped
from lora_ext.tasks import TaskError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
unsaid: list[OSError] = []  # errors of lines that say could not print; main reports the first


@contextmanager
def mistakes() -> Iterator[None]:
    """Reports errors about the user's files without a traceback, and without control characters."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (ValueError, OSError, RuntimeError) as error:
        raise TaskError(escaped(str(error), keep="\n")) from error


def print_json(content: Any) -> None:
    """Prints a dataclass or a JSON value as JSON. NaN and infinite numbers, which JSON lacks, become null."""
    if dataclasses.is_dataclass(content):
        content = dataclasses.asdict(content)
    print(json.dumps(_without_non_finite(content), indent=2, allow_nan=False))


def _without_non_finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _without_non_finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_without_non_finite(value) for value in content]
    return content


def size(text: str) -> int:
    """Parses a size such as ``5GB`` or ``500MiB`` into bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, want a size such as 5GB or 500MB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def tell(text: str) -> None:
    """Prints lines that may contain names of files: escapes control characters and what the terminal cannot show."""
    print(showable(text, keep="\n"))


def say(text: str) -> None:
    """Prints lines of a long command at once: a log has them in order, and before the end.

    A full disk does not end the command, nor a reader that is gone; the disk is told at the end.
    """
    try:
        print(showable(text, keep="\n\t"), flush=True)
    except BrokenPipeError:
        pass
    except OSError as error:  # Python forgets what it could not write, so a later flush would not fail
        unsaid.append(error)


def showable(text: str, keep: str) -> str:
    """Escapes control characters, except those in ``keep``, and what standard output cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    return escaped(text, keep=keep).encode(encoding, "backslashreplace").decode(encoding)


def table(rows: list[list[str]]) -> str:
    """Formats rows as columns; the first row is the heading. The first column is left-aligned, the others right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
