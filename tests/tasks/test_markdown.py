"""Tables in Markdown: a label may hold any text."""

from __future__ import annotations

from lora_ext.tasks.shared.markdown import table


def test_cells_show_what_they_hold():
    shown = table(["a\nb", "<b>x|y</b>"], [["`<r|s>`", "1"], ["\u202e", "2"]])
    assert shown.splitlines() == [
        r"| a\nb | \<b>x\|y\</b> |",
        "| --- | ---: |",
        r"| `<r\|s>` | 1 |",
        r"| \u202e | 2 |",
    ]
