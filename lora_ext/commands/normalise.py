"""``lora-ext normalise``: writes an adapter so that engines which read little of its config compute the same."""

from __future__ import annotations

from pathlib import Path

from lora_ext.checkpoints import normalise
from lora_ext.commands.options import Parser, refusing
from lora_ext.commands.results import tell


def main(argv: list[str]) -> None:
    text = "Folds lora_alpha, rsLoRA and the patterns of ranks and alphas into the factors: one rank, and scaling 1."
    parser = Parser(prog="lora-ext normalise", description=text)
    parser.add_argument("--adapter", type=Path, required=True, metavar="DIR", help="in PEFT's format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new directory for the adapter")
    options = parser.parse_args(argv)
    with refusing(""):
        normalise(options.adapter, options.out)
    tell(f"{options.out}: for inference, with the updates of {options.adapter}")
