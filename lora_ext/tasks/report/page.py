"""The page around the sections: one file that asks nothing of any other."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lora_ext.tasks.report.markup import Html, el, join

__all__ = ["GENERATOR", "Section", "page"]

GENERATOR = "lora-ext report"


@dataclass(frozen=True)
class Section:
    """A part of the page. ``where``: the file that it shows; ``content``: what follows the heading."""

    heading: str
    where: str
    content: Html


def page(title: str, introduction: Sequence[Any], sections: Sequence[Section]) -> str:
    """The document.

    Its Content-Security-Policy lets a browser load nothing, and run no script and apply no style but the page's own:
    what a file of results smuggles in would do nothing even if it were not escaped.
    """
    style, script = (
        Html(resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8")) for kind in ("css", "js")
    )
    policy = [
        "default-src 'none'",
        "img-src data:",
        f"style-src '{_digest(style)}'",
        f"script-src '{_digest(script)}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content="; ".join(policy)),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content=GENERATOR),
        el("title", title),
        el("style", style),
    )
    links = [
        el("li", el("a", each.heading, href=f"#part-{number}"), f" · {each.where}")
        for number, each in enumerate(sections, 1)
    ]
    body = el(
        "body",
        el("header", el("h1", title), *introduction),
        el("nav", el("ul", *links), aria_label="Parts of this page") if len(sections) > 1 else None,
        el("main", *(_section(each, number) for number, each in enumerate(sections, 1))),
        el("script", script),
    )
    return join([Html("<!DOCTYPE html>\n"), el("html", head, Html("\n"), body, lang="en"), "\n"])


def _section(section: Section, number: int) -> Html:
    return join(
        [
            Html("\n"),
            el(
                "section",
                el("h2", section.heading),
                el("p", section.where, class_="measured"),
                section.content,
                id=f"part-{number}",
            ),
        ]
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
