"""Pictures that commands left, as parts of the page, as long as it stays small."""

from __future__ import annotations

import base64
import re
from pathlib import Path

from lora_ext.files import open_regular
from lora_ext.tasks.report.markup import Html, count, el
from lora_ext.tasks.report.results import Result

__all__ = ["CURVE", "Pictures", "curves_of_runs"]

CURVE = "loss_curve.png"
_PNG = b"\x89PNG\r\n\x1a\n"


class Pictures:
    """Embeds PNG files.

    Args:
        most_bytes: that all of them together take in the page.
    """

    def __init__(self, most_bytes: int = 1_500_000) -> None:
        self._left = most_bytes

    def embed(self, path: Path, alt: str) -> Html | None:
        """The picture; None: it is not there, no PNG, or there is no room for it."""
        try:
            with open_regular(path) as file:
                content = file.read(self._left)
        except (OSError, ValueError):
            return None
        text = base64.b64encode(content).decode()
        if not content.startswith(_PNG) or len(text) > self._left:
            return None
        self._left -= len(text)
        return el("img", src=f"data:image/png;base64,{text}", alt=alt, class_="picture")


def curves_of_runs(result: Result, pictures: Pictures) -> Html | None:
    """The losses in the first run of every group in ``runs/``."""
    found, left_out = [], 0
    groups = (group for group in (result.directory / "runs").glob("*") if group.is_dir())
    for group in sorted(groups):
        curves = sorted(group.glob(f"seed-*/{CURVE}"), key=_seed)
        if not curves:
            continue
        text = f"{group.name}, {curves[0].parent.name}"
        picture = pictures.embed(curves[0], f"loss of {text}")
        left_out += picture is None
        if picture is not None:
            found.append(el("figure", picture, el("figcaption", text)))
    if not found:
        return None
    note = f"{count(left_out, 'more curve')} would make the page too large; runs/ has them." if left_out else None
    summary = el("summary", "Loss in each group's first run")
    return el("details", summary, el("div", *found, class_="multiples"), el("p", note) if note else None)


def _seed(path: Path) -> tuple[int, str]:
    digits = re.search(r"\d+$", path.parent.name)
    return int(digits[0]) if digits else 0, str(path)
