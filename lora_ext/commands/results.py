"""Writes results: files that are whole or absent, tables, and the command and machine behind a result."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from lora_ext import info
from lora_ext._common.messages import escaped
from lora_ext.commands.options import CommandError


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to a temporary name next to ``path``, and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _whole(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name next to ``path`` to write to; renames it at the end, and removes it after an error.

    An OSError that does not say where, as that of a full disk, gets the name ``path``.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        error.filename = str(path) if error.filename in (None, str(part)) else error.filename
        raise
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON by :func:`write_text`. NaN and infinite numbers, which JSON lacks, become null."""
    write_text(path, to_json(content))


def to_json(content: Any) -> str:
    """Returns a dataclass or a JSON value as JSON text."""
    content = dataclasses.asdict(content) if dataclasses.is_dataclass(content) else content
    return json.dumps(_finite(content), indent=2, allow_nan=False, default=str) + "\n"


def _finite(content: Any) -> Any:
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return [_finite(value) for value in content] if isinstance(content, list | tuple) else content


def read_json(path: Path) -> dict[str, Any]:
    """Reads a result. CommandError: it is not there, or holds no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path} holds no JSON: {error}; remove it, or make it again") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path} holds no JSON object; remove it, or make it again")
    return content


def save_figure(path: Path, figure: Any) -> None:
    """Writes a matplotlib figure as PNG, whole or not at all."""
    with _whole(path) as part:
        figure.savefig(part, dpi=150, bbox_inches="tight", format="png")


def made_by(command: str, argv: Sequence[str]) -> dict[str, Any]:
    """Returns a result's command, the current time and the machine."""
    return {
        "command": ["lora-ext", command, *argv],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "platform": platform.platform(),
            "processor": info.cpu_model(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table; the first column is aligned left, the others right. Cells show what they hold, also HTML."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    text = escaped(text).replace("|", "\\|")
    return text if text.startswith("`") else text.replace("<", "\\<")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows for a terminal; the first row is the heading, the first column is left-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def tell(text: str) -> None:
    """Prints lines that may contain names of files: escapes control characters and what the terminal cannot show."""
    encoding = sys.stdout.encoding or "utf-8"
    print(escaped(text, keep="\n\t").encode(encoding, "backslashreplace").decode(encoding), flush=True)


def measured_on(result: Mapping[str, Any]) -> str:
    """Formats ``result["machine"]`` and ``["date"]`` as a line for the foot of a table."""
    host = result["machine"]
    where = f"{host['processor']}, {host['threads']} threads, {host['gpu'] or 'no GPU'}"
    return f"{where}, torch {host['torch']}, {result['date'][:10]}."


def readable(count: float) -> str:
    """Formats bytes with three digits in a decimal unit: ``1.40 TB``, ``349 GB``, ``37.7 MB``."""
    if count < 1000:
        return f"{count:.0f} B"
    units = ["TB", "GB", "MB", "kB"]
    while (count := count / 1000) >= 999.5 and len(units) > 1:
        units.pop()
    digits = 2 if count < 9.995 else 1 if count < 99.95 else 0
    return f"{count:,.{digits}f} {units[-1]}"
