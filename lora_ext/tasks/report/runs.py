"""What single runs of ``finetune`` gave: figures and the curve of the loss."""

from __future__ import annotations

from lora_ext.tasks.finetune.results import figures
from lora_ext.tasks.report.facts import data_of, description_list, model_of, reproduce
from lora_ext.tasks.report.markup import Cell, Html, bullets, el, join, paragraph, table
from lora_ext.tasks.report.methods import own_settings
from lora_ext.tasks.report.pictures import CURVE, Pictures
from lora_ext.tasks.report.results import Result

__all__ = ["show_run"]


def show_run(result: Result, pictures: Pictures) -> Html:
    """The section's content."""
    content = result.content
    settings = content["settings"]
    curve = pictures.embed(result.directory / CURVE, "training and validation loss by epoch")
    test, share = content["examples"]["test"], content["after"]["accuracy"]
    error = (share * (1 - share) / test) ** 0.5 if test else 0.0
    most, merged = content.get("majority"), content.get("merged") or {}
    beaten = (
        f"Who always answers {most['label']!r}, the most frequent label of the training texts, is right on "
        f"{most['accuracy']:.2%}."
        if most
        else None
    )
    same = merged.get("texts") is not None and merged["same_answers"] == merged["texts"]
    shown = {name: value for name, value in own_settings(settings).items() if value is not None}
    facts = [("Model", model_of(content)), ("Data", data_of(content)), ("Method", settings["method"])]
    return join(
        [
            paragraph(
                f"{share:.2%} of the answers are right; on {test:,} test texts one standard error is "
                f"{100 * error:.1f} points.",
                beaten,
                f"Merged into the weights, the adapter gives the same answers on the {merged['texts']} longest of them."
                if same
                else None,
            ),
            description_list(facts),
            table(
                "Figures", ["figure", "value"], [[name, Cell(text)] for name, text in figures(content)], sortable=False
            ),
            el("figure", curve, el("figcaption", "Training and validation loss by epoch.")) if curve else None,
            el(
                "details",
                el("summary", "Settings"),
                bullets(f"{name.replace('_', ' ')}: {value}" for name, value in shown.items()),
            ),
            reproduce(result),
        ]
    )
