"""Where a result comes from: its command, its date and its machine."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from lora_ext import info


def made_by(command: Sequence[str] | None = None) -> dict[str, Any]:
    """The command, by default that of this process, and the time, for a result."""
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
    """A line for the foot of a table: where and when ``result["machine"]`` and ``["date"]`` say it was measured."""
    own = result["machine"]
    gpu = own["gpu"] or "no GPU"
    return f"{own['processor']}, {own['threads']} threads, {gpu}, torch {own['torch']}, {result['date'][:10]}."
