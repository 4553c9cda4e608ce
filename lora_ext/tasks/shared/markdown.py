"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from lora_ext._common.printable import escaped


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table; the first column is aligned left and the others right. Cells show what they hold, also HTML."""
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    text = escaped(text).replace("|", "\\|")
    return text if text.startswith("`") else text.replace("<", "\\<")
