"""Embeds the pictures of results as data URIs, up to a limit on the size of the page."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from lora_ext.files import open_regular
from lora_ext.tasks.report.results import Result
from lora_ext.tasks.report.tables import count

CURVE = "loss_curve.png"
_PNG = b"\x89PNG\r\n\x1a\n"


class Pictures:
    """Embeds PNG files. ``most_bytes``: limit for all of them together, as text of the page."""

    def __init__(self, most_bytes: int = 1_500_000) -> None:
        self._remaining = most_bytes

    def embed(self, path: Path) -> str | None:
        """Returns the picture's data URI; None if it is missing, is not a PNG, or exceeds the limit."""
        try:
            with open_regular(path) as file:
                content = file.read(self._remaining)
        except (OSError, ValueError):
            return None
        text = base64.b64encode(content).decode()
        if not content.startswith(_PNG) or len(text) > self._remaining:
            return None
        self._remaining -= len(text)
        return f"data:image/png;base64,{text}"


def curves_of_runs(result: Result, pictures: Pictures) -> dict[str, Any]:
    """Returns the losses in the first run of every group in ``runs/``: name and data URI; ``left_out`` have no room."""
    found, left_out = [], 0
    for group in sorted(group for group in (result.directory / "runs").glob("*") if group.is_dir()):
        curves = sorted(group.glob(f"seed-*/{CURVE}"), key=_seed)
        if not curves:
            continue
        picture = pictures.embed(curves[0])
        left_out += picture is None
        if picture is not None:
            found.append((f"{group.name}, {curves[0].parent.name}", picture))
    return {"pictures": found, "left_out": count(left_out, "more curve") if left_out else None}


def _seed(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+$", path.parent.name)
    return int(digits[0]) if digits else 0, str(path)
