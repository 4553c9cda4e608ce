"""``lora-ext ...``: parses arguments, calls what they ask for, and turns mistakes into one line and an exit code."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from . import info
from .tasks import TaskError
from .tasks.settings import METHODS, Settings

_EXIT_MISTAKE, _EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 after a mistake of the user, 130 after Ctrl-C."""
    parser, finetune_parser = _build_parsers()
    args = parser.parse_args(argv)
    try:
        if args.command == "info":
            print(info.info(json=args.json), flush=True)
        else:
            _finetune(args, parser, finetune_parser, argv)
    except TaskError as error:
        print(f"lora-ext: error: {error}", file=sys.stderr)
        return _EXIT_MISTAKE
    except KeyboardInterrupt:
        print("lora-ext: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _finetune(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    finetune_parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> None:
    saved = None
    if args.resume:
        saved = Settings.load(args.out)
        finetune_parser.set_defaults(**asdict(saved))  # nobody need repeat what the run was started with ...
        args = parser.parse_args(argv)
    for name in ("data", "eval_file"):  # a resumed run may start in another directory
        if (path := getattr(args, name)) is not None:
            setattr(args, name, str(Path(path).resolve()))
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    if saved is not None and settings != saved:
        changed = ", ".join(
            f"--{name.replace('_', '-')} {value}, now {asdict(settings)[name]}"
            for name, value in asdict(saved).items()
            if asdict(settings)[name] != value
        )
        raise TaskError(f"--resume: the run in {args.out} was started with {changed}")  # ... or may change it
    missing = [name for name in ("transformers", "accelerate", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f"finetune needs {', '.join(missing)}: pip install 'lora_ext[finetune]'")
    from .tasks.finetune import finetune  # imports transformers, which takes seconds

    try:
        finetune(settings, args.out, resume=args.resume, overwrite=args.overwrite)
    except KeyboardInterrupt:
        if any(args.out.glob("checkpoints/checkpoint-*")):
            print(f"\nto continue: lora-ext finetune --resume --out {shlex.quote(str(args.out))}", file=sys.stderr)
        raise


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def _build_parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    parser = argparse.ArgumentParser(prog="lora-ext", description="LoRA in fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = commands.add_parser("info", help="what was built, and what of it runs on this machine")
    about.add_argument("--json", action="store_true", help="as JSON")

    finetune = commands.add_parser(
        "finetune",
        help="fine-tune a text classifier, and report what it cost and gave",
        description="Fine-tunes a text classifier. Without --model and --data: the demo model on the demo reviews.",
        formatter_class=_HelpFormatter,
    )
    add = finetune.add_argument
    add("--model", metavar="PATH_OR_ID", help="a directory or hub id that transformers loads; else the demo model")
    add("--data", metavar="FILE", help=".csv, .tsv or .jsonl with a text and a label column; else the demo reviews")
    add("--eval-file", metavar="FILE", help="test on this file, in place of a part of --data")
    add("--text-column", metavar="NAME", help="column of the texts")
    add("--label-column", metavar="NAME", help="column of the labels, strings or integers")
    add("--validation-split", type=float, metavar="FRACTION", help="part of --data to evaluate on after each epoch")
    add("--test-split", type=float, metavar="FRACTION", help="part of --data held out until the end")
    add("--method", metavar="NAME", help=f"one of {', '.join(METHODS)}; full trains every weight, for comparison")
    add("--r", type=int, metavar="RANK", help="rank of the adapters")
    add("--lora-alpha", type=float, metavar="ALPHA", help="the update is scaled by ALPHA / RANK")
    add("--lora-dropout", type=float, metavar="P", help="dropout on the adapters' input")
    add("--target-modules", metavar="NAMES", help="layers to adapt: query,value, or all-linear, or a regex")
    add("--modules-to-save", metavar="NAMES", help="modules to train in full beside the head")
    add("--epochs", type=float, help="passes over the training texts")
    add("--batch-size", type=int, help="texts a step")
    add("--learning-rate", type=float, help="peak; falls linearly to 0")
    add("--warmup", type=float, metavar="FRACTION", help="part of the steps in which the learning rate rises")
    add("--max-length", type=int, metavar="TOKENS", help="longer texts are cut")
    add("--seed", type=int, help="of the new head, the adapters, the order of the texts and dropout")
    finetune.set_defaults(**asdict(Settings()))
    add("--out", type=Path, required=True, metavar="DIR", help="gets the adapter, metrics, loss curve and predictions")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--overwrite", action="store_true", help="replace the run in --out")
    return parser, finetune


if __name__ == "__main__":
    sys.exit(main())
