"""Options of the commands that train: of finetune, and of commands that run it many times."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_ext._common.install_hint import install_hint
from lora_ext.cli import files
from lora_ext.methods import METHODS
from lora_ext.tasks import TaskError, WriteError
from lora_ext.tasks.comparison.launch import LAUNCHERS, Launch
from lora_ext.tasks.finetune import extra_arguments
from lora_ext.tasks.finetune.defaults import USUAL, WITH_EMBEDDINGS
from lora_ext.tasks.finetune.settings import Settings, load_request
from lora_ext.tasks.shared import sigterm


def add_options(parser: argparse.ArgumentParser, without: tuple[str, ...] = ()) -> None:
    """Adds an option, with its default, for every field of :class:`Settings` except ``without``."""

    def add(option: str, *aliases: str, **arguments: Any) -> None:
        if option.removeprefix("--").replace("-", "_") not in without:
            parser.add_argument(option, *aliases, **arguments)

    add("--model", metavar="PATH_OR_ID", help="a directory or hub id that transformers loads; default: the demo model")
    add("--data", metavar="FILE", help=".csv, .tsv or .jsonl with a text and a label column; default: the demo reviews")
    add("--validation-file", metavar="FILE", help="evaluate on this file instead of a part of --data")
    add("--test-file", "--eval-file", metavar="FILE", help="test on this file instead of a part of --data")
    add("--text-column", metavar="NAME", help="column of the texts")
    add("--label-column", metavar="NAME", help="column of the labels, strings or integers")
    add("--validation-split", type=float, metavar="FRACTION", help="part of --data to evaluate on after each epoch")
    add("--test-split", type=float, metavar="FRACTION", help="part of --data held out until the end")
    add("--method", metavar="NAME", help=f"{', '.join(METHODS)}, or several joined by +, as lora+prefix-embed")
    pooling = "what the head reads: cls, the first token through the pooler, or mean, the mean over a text's tokens; "
    add("--pooling", metavar="NAME", help=f"{pooling}default: as the model's config says, or else cls")
    # torchrun takes --r for an abbreviation of its own options.
    usual = lambda name: f"default: {WITH_EMBEDDINGS[name]:g} ({USUAL[name]:g} if layers are named)"  # noqa: E731
    add("--r", "--rank", type=int, metavar="RANK", help=f"rank of the adapters; {usual('r')}")
    alpha = f"default: 0.2 RANK ({USUAL['lora_alpha']:g} if layers are named)"
    add("--lora-alpha", type=float, metavar="ALPHA", help=f"the update is scaled by ALPHA / RANK; {alpha}")
    add("--lora-dropout", type=float, metavar="P", help="dropout on the adapters' input")
    ratio = "learning rate of lora_B over that of the rest (LoRA+, arXiv 2402.12354); " + usual("lora_plus_ratio")
    add("--lora-plus-ratio", type=float, metavar="RATIO", help=ratio)
    targets = "layers to adapt: some of q,k,v,o; or module names, all-linear and embeddings among them; or a regex; "
    targets += f"default: {WITH_EMBEDDINGS['target_modules']} ({USUAL['target_modules']} with --quantize)"
    add("--target-modules", metavar="NAMES", help=targets)
    saved = "modules to train in full, in addition to the head; auto: the pooler, if there is one; default: auto "
    add("--modules-to-save", metavar="NAMES", help=f"{saved}(none if layers are named)")
    add("--bottleneck-size", type=int, metavar="SIZE", help="hidden features of adapter-h, -l, -p and -drop")
    add("--drop-layers", type=int, metavar="N", help="lower layers without adapter-drop's adapters; default: 5 of 12")
    prefix = "trained tokens before the input: prefix-embed, -layer"
    add("--prefix-length", type=int, metavar="TOKENS", help=prefix)
    add("--infix-length", type=int, metavar="TOKENS", help="trained tokens after the input")
    add("--epochs", type=float, help="passes over the training texts")
    add("--batch-size", type=int, help="texts in a batch")
    add("--accumulation-steps", type=int, metavar="N", help="batches whose gradients make one optimizer step")
    add("--learning-rate", type=float, help="peak learning rate; default: that of the method")
    add("--warmup", type=float, metavar="FRACTION", help="part of the steps in which the learning rate rises")
    others = "for other methods, or if layers are named"
    schedule = f"learning rate after the warmup: linear, to 0, or constant; default: constant (linear {others})"
    add("--schedule", metavar="NAME", help=schedule)
    average = "decay of a moving average of the trained weights, which is evaluated and saved; 0: none; default: "
    average += f"{WITH_EMBEDDINGS['ema_decay']} (0 {others})"
    add("--ema-decay", type=float, metavar="DECAY", help=average)
    best = "keep the weights of the epoch with the best validation score"
    add("--best-metric", metavar="NAME", help=f"{best}: {', '.join(Settings.BEST_METRICS)}; default: the last ones")
    patience = "stop after so many evaluations without a better --best-metric"
    add("--early-stopping", type=int, metavar="N", help=patience)
    weights = "balanced: a class counts in the loss as much as any other, however few texts it has"
    add("--class-weights", metavar="HOW", help=weights)
    add(
        "--precision", metavar="DTYPE", help="dtype of products: float32, or bfloat16 by autocast; weights stay float32"
    )
    add(
        "--dtype", metavar="DTYPE", help="dtype of the checkpoint's weights: float32 or bfloat16; adapters stay float32"
    )
    add(
        "--gradient-checkpointing",
        nargs="?",
        const="non-reentrant",
        metavar="KIND",
        help="keep only the input of a layer, and compute the layer again in the backward: non-reentrant (without "
        "KIND), reentrant, or no",
    )
    add("--quantize", metavar="FORMAT", help="quantise the frozen weights: nf4 (4 bits) or int8, by bitsandbytes")
    trim = "keep the embedding rows that the data use only, and write that checkpoint to OUT/base"
    add("--trim-vocabulary", action="store_true", help=trim)
    add("--max-length", type=int, metavar="TOKENS", help="longer texts are cut")
    add("--seed", type=int, help="seed of the new head, the adapters, the order of the texts and dropout")
    extra = "a field of transformers.TrainingArguments that no other option sets, such as weight_decay=0.01; repeatable"
    add("--set", action=_Set, metavar="NAME=VALUE", help=extra)
    parser.set_defaults(**{field.name: field.default for field in fields(Settings) if field.name not in without})


class _Set(argparse.Action):
    """Adds ``NAME=VALUE`` to the earlier ones; the last value of a name counts."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, extra_arguments.merged(getattr(namespace, self.dest), values))


def options_of(
    args: argparse.Namespace, without: tuple[str, ...] = (), kind: type[Settings] = Settings
) -> dict[str, Any]:
    """The values of :func:`add_options`, with absolute paths: a resumed run may start in another directory."""
    options = {field.name: getattr(args, field.name) for field in fields(kind) if field.name not in without}
    for name in kind.INPUTS:
        if options[name] is not None and (name != "model" or Path(options[name]).exists()):  # otherwise it is an id
            options[name] = str(Path(options[name]).resolve())
    return options


def add_out(parser: argparse.ArgumentParser, gets: str) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help=f"directory for {gets}")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")


def mode(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options of :func:`add_out` except the directory, and how lines are shown to the user."""
    return {"resume": args.resume, "overwrite": args.overwrite, "say": files.say}


def add_launch(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where runs go; :func:`launch_of` reads them."""
    add = parser.add_argument_group("where the runs go").add_argument
    jobs = "number of runs at once. On this machine they share --threads, and each takes a CUDA device (default: 1); "
    add("--jobs", type=at_least_1, metavar="N", help=f"{jobs}as jobs each has --threads (default: all runs)")
    launcher = "local: processes of this machine; submitit: jobs of Slurm, with --out in a directory that all machines "
    add("--launcher", choices=LAUNCHERS, default=LAUNCHERS[0], help=f"{launcher}see")
    add("--partition", metavar="NAME", help="Slurm's partition, with --launcher submitit")
    add("--gpus-per-run", type=int, metavar="N", help="0 or 1 GPU for each run, with --launcher submitit")
    limit = "a job that takes longer continues in another one, at most three times; with --launcher submitit"
    add("--time-limit", type=at_least_1, metavar="MINUTES", help=f"{limit} (default: a day)")
    more = "another parameter of submitit's AutoExecutor, such as mem_gb=32 or slurm_account=nlp; repeatable"
    add("--launcher-set", action="append", default=[], metavar="NAME=VALUE", help=more)


def launch_of(args: argparse.Namespace) -> Launch:
    names = ("launcher", "jobs", "partition", "gpus_per_run", "time_limit")
    return Launch(**{name: getattr(args, name) for name in names}, more=tuple(args.launcher_set))


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, want an integer of at least 1")
    return int(text)


def check_installed(
    command: str, extra: str = "finetune", names: Sequence[str] = ("transformers", "accelerate", "matplotlib")
) -> None:
    """Raises TaskError if a package that the command needs is missing; the message says how to install it."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise TaskError(f"{command} needs {', '.join(missing)}: {install_hint(extra)}")


def add_threads(parser: argparse.ArgumentParser, resumes: bool = True) -> None:
    default = "the number of cores, or as the resumed run was started" if resumes else "the number of cores"
    parser.add_argument("--threads", type=at_least_1, metavar="N", help=f"threads for PyTorch; default: {default}")


def use_threads(given: int | None, before: int | None = None) -> None:
    """Sets PyTorch's threads: ``given``, or those of the resumed run, on which the last bits of sums depend."""
    import torch

    usual = torch.get_num_threads()
    if given is None and before not in (None, usual):
        print(f"with {before} threads, as the run was started; --threads changes that", flush=True)
    torch.set_num_threads(given or before or usual)


def integers(text: str) -> list[int]:
    """Parses ``0,1,2``."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, want integers such as 0,1,2") from None


def with_saved(
    args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace], name: str, lists: Mapping[str, type]
) -> argparse.Namespace:
    """Parses the arguments again, with those of the run in ``args.out`` as defaults.

    Other arguments may be given: only runs that they change are repeated. The ``lists``, such as methods and seeds, are
    added to those of the run.
    """
    saved = load_request(args.out, name, lists)
    options = saved.pop("options")
    again = parse_again(**saved, **options)
    for key in lists:
        setattr(again, key, list(dict.fromkeys([*saved[key], *getattr(again, key)])))
    return again


@contextmanager
def saying_how_to_resume(
    command: str, out: Path, marker: str, resume: bool, launch: Launch | None = None
) -> Iterator[None]:
    """After Ctrl-C, SIGTERM or on a full disk, says how to resume, if a run has begun, which writes ``marker``.

    SIGTERM is Ctrl-C within the block, unless jobs are submitted: they go on when the command that waits for them ends.
    """
    path = out / marker
    before = path.stat().st_mtime_ns if path.is_file() else None
    try:
        with sigterm.listening() if launch is None or launch.launcher == "local" else nullcontext():
            yield
    except (KeyboardInterrupt, WriteError) as error:
        if resume or (path.is_file() and path.stat().st_mtime_ns != before):
            when = "to continue" if isinstance(error, KeyboardInterrupt) else "to continue when it can be written"
            again = ["lora-ext", command, "--resume", "--out", str(out), *(launch.arguments() if launch else [])]
            how = f"{when}: {shlex.join(again)}"
            if isinstance(error, WriteError):
                raise WriteError(f"{error}; {how}") from error
            print(f"\n{how}", file=sys.stderr)
        raise
