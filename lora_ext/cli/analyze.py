"""``lora-ext analyze``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from lora_ext.cli import files, training
from lora_ext.tasks import TaskError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "analyze",
        help="show what adapters learned: subspaces, spectra, amplification, layers that changed most",
        description=(
            "Analyses adapters as section 7 of the LoRA paper does: similarity of subspaces, singular values and "
            "effective ranks of the updates, and their projection onto the base's weights. Works on the factors, and "
            "holds one weight in memory at a time."
        ),
    )
    add = parser.add_argument
    add(
        "--adapter",
        dest="adapters",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="in PEFT's format; two or more are compared with each other, layer by layer",
    )
    add(
        "--base",
        metavar="PATH_OR_ID",
        help="safetensors of the base model; default: the one that the adapters name, if found",
    )
    add("--no-base", dest="use_base", action="store_false", help="leave out results that need the base's weights")
    add("--layers", metavar="REGEX", help="only layers whose name contains a match: 'layers\\.0\\.|q_proj'")
    add("--directions", type=int, metavar="N", help="most directions to compare for each factor (default: 64)")
    files.add_fan_in_fan_out(parser)
    files.add_pickle(parser)
    add("--seed", type=int, help="seed of the random directions (default: 0)")
    training.add_out(parser, "analysis.json, analysis.md and pictures")
    parser.set_defaults(run=run, use_base=None, allow_pickle=None)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    training.check_installed("analyze", "analyze", ["matplotlib"])
    from lora_ext.tasks.analyze.run import SETTINGS_FILE, AnalysisSettings, analyze  # imports matplotlib

    # None for options that are not given: a resumed run keeps those it was started with.
    names = ("adapters", "base", "use_base", "layers", "directions", "fan_in_fan_out", "allow_pickle", "seed")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    # A resumed run may start in another directory.
    given |= {"adapters": tuple(str(Path(path).resolve()) for path in given.get("adapters", ()))}
    if "base" in given and Path(given["base"]).exists():
        given["base"] = str(Path(given["base"]).resolve())
    if args.resume:
        settings = AnalysisSettings.load(args.out)
        changed = [
            f"--{'adapter' if name == 'adapters' else name.replace('_', '-')} {getattr(settings, name)}, now {value}"
            for name, value in given.items()
            if value not in ((), getattr(settings, name))
        ]
        if changed:
            raise TaskError(f"--resume: the run in {args.out} was started with {', '.join(changed)}")
    else:
        settings = AnalysisSettings(**given)
    with files.mistakes(), training.saying_how_to_resume("analyze", args.out, SETTINGS_FILE, args.resume):
        analyze(settings, args.out, show_progress=True, **training.mode(args))
