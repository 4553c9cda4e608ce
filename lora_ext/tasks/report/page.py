"""The page around the sections: one file that loads no other."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lora_ext.tasks.report.tables import printable

GENERATOR = "lora-ext report"

# StrictUndefined: a figure that a result lacks is an error, not a hole in a sentence.
_TEMPLATES = Environment(
    loader=PackageLoader("lora_ext.tasks.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        where: the file that it shows.
        content: what follows the heading.
        command, measured: the command that makes the result again, and machine and date; None: not known.
    """

    heading: str
    where: str
    content: Markup
    command: str | None
    measured: str | None


def render(template: str, **context: Any) -> Markup:
    """Fills a template; escapes all values except Markup."""
    return Markup(_TEMPLATES.get_template(template).render(context))


def page(title: str, facts: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """Returns the document.

    Its Content-Security-Policy lets a browser load nothing, and run no script and apply no style other than the page's
    own: markup that gets in through a file of results would do nothing even if it were not escaped.
    """
    files = {
        kind: Markup(resources.files(__package__).joinpath(f"page.{kind}").read_text("utf-8")) for kind in ("css", "js")
    }
    return printable(render("page.html", title=title, facts=facts, sections=sections, generator=GENERATOR, **files))


def _digest(text: str) -> str:
    """Returns the source expression that allows an inline script or style (CSP level 3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_TEMPLATES.filters["digest"] = _digest
