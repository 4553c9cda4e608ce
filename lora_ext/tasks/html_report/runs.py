"""What single runs of ``finetune`` gave: figures and the curve of the loss."""

from __future__ import annotations

from ..report import figures
from .facts import data_of, description_list, model_of, reproduce
from .markup import Cell, Html, bullets, el, join, paragraph, table
from .pictures import CURVE, Pictures
from .results import Result

__all__ = ["show_run"]


def show_run(result: Result, pictures: Pictures) -> Html:
    """The section's content."""
    content = result.content
    settings = content["settings"]
    curve = pictures.embed(result.directory / CURVE, "training and validation loss by epoch")
    gained = content["after"]["accuracy"] - content["before"]["accuracy"]
    test, share = content["examples"]["test"], content["after"]["accuracy"]
    error = (share * (1 - share) / test) ** 0.5 if test else 0.0
    merged = content.get("merged")
    same = merged is not None and merged["accuracy"] == content["after"]["accuracy"]
    facts = [("Model", model_of(content)), ("Data", data_of(content)), ("Method", settings["method"])]
    return join(
        [
            paragraph(
                f"The share of right answers went from {content['before']['accuracy']:.2%} to "
                f"{content['after']['accuracy']:.2%} ({100 * gained:+.1f} points); on {test:,} test texts one standard "
                f"error is {100 * error:.1f} points.",
                "Merged into the weights, the adapter gives the same accuracy." if same else None,
            ),
            description_list(facts),
            table(
                "Figures", ["figure", "value"], [[name, Cell(text)] for name, text in figures(content)], sortable=False
            ),
            el("figure", curve, el("figcaption", "Training and validation loss by epoch.")) if curve else None,
            el(
                "details",
                el("summary", "Settings"),
                bullets(f"{name.replace('_', ' ')}: {value}" for name, value in settings.items() if value is not None),
            ),
            reproduce(result),
        ]
    )
