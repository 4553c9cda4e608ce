"""Options of the commands that train: of finetune itself, and of those that run it many times."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lora_ext._common.install_hint import install_hint
from lora_ext.methods import METHODS
from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.finetune.settings import INPUTS, Settings, load_plan


def add_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """An option for every field of :class:`Settings` but ``without``, with its default."""

    def add(option: str, **arguments: Any) -> None:
        if option.removeprefix("--").replace("-", "_") not in without:
            parser.add_argument(option, **arguments)

    add("--model", metavar="PATH_OR_ID", help="a directory or hub id that transformers loads; else the demo model")
    add("--data", metavar="FILE", help=".csv, .tsv or .jsonl with a text and a label column; else the demo reviews")
    add("--eval-file", metavar="FILE", help="test on this file, in place of a part of --data")
    add("--text-column", metavar="NAME", help="column of the texts")
    add("--label-column", metavar="NAME", help="column of the labels, strings or integers")
    add("--validation-split", type=float, metavar="FRACTION", help="part of --data to evaluate on after each epoch")
    add("--test-split", type=float, metavar="FRACTION", help="part of --data held out until the end")
    add("--method", metavar="NAME", help=f"{', '.join(METHODS)}, or several joined by +, as lora+prefix-embed")
    add("--r", type=int, metavar="RANK", help="rank of the adapters")
    add("--lora-alpha", type=float, metavar="ALPHA", help="the update is scaled by ALPHA / RANK")
    add("--lora-dropout", type=float, metavar="P", help="dropout on the adapters' input")
    ratio = "learning rate of lora_B over that of all else (LoRA+, arXiv 2402.12354)"
    add("--lora-plus-ratio", type=float, metavar="RATIO", help=ratio)
    targets = "layers to adapt: of q,k,v,o; or module names; or all-linear; or a regex"
    add("--target-modules", metavar="NAMES", help=targets)
    add("--modules-to-save", metavar="NAMES", help="modules to train in full beside the head")
    add("--bottleneck-size", type=int, metavar="SIZE", help="hidden features of adapter-h, -l, -p and -drop")
    add("--drop-layers", type=int, metavar="N", help="lower layers without adapter-drop's adapters; else 5 of 12")
    prefix = "trained tokens in front of the input: prefix-embed, -layer"
    add("--prefix-length", type=int, metavar="TOKENS", help=prefix)
    add("--infix-length", type=int, metavar="TOKENS", help="trained tokens behind it")
    add("--epochs", type=float, help="passes over the training texts")
    add("--batch-size", type=int, help="texts a step")
    add("--learning-rate", type=float, help="peak; else the method's own default")
    add("--warmup", type=float, metavar="FRACTION", help="part of the steps in which the learning rate rises")
    add("--schedule", metavar="NAME", help="of the learning rate after the warmup: linear, to 0, or constant")
    average = "of an exponential moving average of what is trained, which is evaluated and saved; 0: none"
    add("--ema-decay", type=float, metavar="DECAY", help=average)
    add("--precision", metavar="DTYPE", help="of the products: float32, or bfloat16 by autocast; weights stay float32")
    add("--max-length", type=int, metavar="TOKENS", help="longer texts are cut")
    add("--seed", type=int, help="of the new head, the adapters, the order of the texts and dropout")
    defaults = asdict(Settings()) | {"learning_rate": None}
    parser.set_defaults(**{name: value for name, value in defaults.items() if name not in without})


def options_of(args: argparse.Namespace, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of :func:`add_options`; files by absolute paths, as a resumed run may start in another directory."""
    options = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name not in without}
    for name in INPUTS:
        if options[name] is not None and (name != "model" or Path(options[name]).is_dir()):  # else it is an id
            options[name] = str(Path(options[name]).resolve())
    return options


def add_out(parser: argparse.ArgumentParser, gets: str) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help=f"gets {gets}")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")


def mode(args: argparse.Namespace) -> dict[str, bool]:
    """Of the options of :func:`add_out`, what is not the directory."""
    return {"resume": args.resume, "overwrite": args.overwrite}


def add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--jobs", type=at_least_1, default=1, metavar="N", help="runs at once, sharing the threads")


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, want an integer of at least 1")
    return int(text)


def check_installed(
    command: str, extra: str = "finetune", names: Sequence[str] = ("transformers", "accelerate", "matplotlib")
) -> None:
    """TaskError: a package that the command needs is missing; the message says how to get it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f"{command} needs {', '.join(missing)}: {install_hint(extra)}")


def add_threads(parser: argparse.ArgumentParser) -> None:
    default = "that PyTorch computes with; else as many as the machine has cores, or as a resumed run was started with"
    parser.add_argument("--threads", type=at_least_1, metavar="N", help=default)


def use_threads(given: int | None, before: int | None = None) -> None:
    """Computes with the number ``given``, or that of the run that is resumed: the last bits of sums depend on it."""
    import torch

    usual = torch.get_num_threads()
    if given is None and before not in (None, usual):
        print(f"with {before} threads, as the run was started; --threads changes that", flush=True)
    torch.set_num_threads(given or before or usual)


def integers(text: str) -> list[int]:
    """``0,1,2``"""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, want integers such as 0,1,2") from None


def without(methods: list[str], left_out: list[str]) -> list[str]:
    """TaskError: one that is to be left out is not there."""
    if unknown := [each for each in left_out if each not in methods]:
        raise TaskError(f"--without {unknown[0]}: there are {', '.join(methods)}")
    return [each for each in methods if each not in left_out]


def with_saved(
    args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace], name: str, lists: Mapping[str, type]
) -> argparse.Namespace:
    """The arguments with those that the run in ``args.out`` was started with as defaults.

    Others may be given: what is done already and not changed by them is not done again. The ``lists``, as of methods
    and seeds, are added to what there is.
    """
    saved = load_plan(args.out, name, lists)
    options = saved.pop("options")
    again = parse_again(**saved, **options)
    for key in lists:
        setattr(again, key, list(dict.fromkeys([*saved[key], *getattr(again, key)])))
    return again


@contextmanager
def saying_how_to_resume(command: str, out: Path, marker: str, resume: bool, jobs: int = 1) -> Iterator[None]:
    """After Ctrl-C and on a full disk, where by then a run had begun, which writes ``marker`` into ``out``."""
    path = out / marker
    before = path.stat().st_mtime_ns if path.is_file() else None
    try:
        yield
    except (KeyboardInterrupt, WriteError) as error:
        if resume or (path.is_file() and path.stat().st_mtime_ns != before):
            more = f" --jobs {jobs}" if jobs != 1 else ""
            when = "to continue" if isinstance(error, KeyboardInterrupt) else "to continue when it can be written"
            how = f"{when}: lora-ext {command} --resume --out {shlex.quote(str(out))}{more}"
            if isinstance(error, WriteError):
                raise WriteError(f"{error}; {how}") from error
            print(f"\n{how}", file=sys.stderr)
        raise
