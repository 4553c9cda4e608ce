"""Provenance of a result: its command, date and machine."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from lora_ext import info


def made_by(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns a result's command, by default this process's, and the current time."""
    return {
        "command": ["lora-ext", *sys.argv[1:]] if command is None else list(command),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "processor": info.cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def measured_on(result: Mapping[str, Any]) -> str:
    """Formats ``result["machine"]`` and ``["date"]`` as a line for the foot of a table."""
    host = result["machine"]
    gpu = host["gpu"] or "no GPU"
    return f"{host['processor']}, {host['threads']} threads, {gpu}, torch {host['torch']}, {result['date'][:10]}."
