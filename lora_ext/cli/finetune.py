"""``lora-ext finetune``"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any

from lora_ext.cli import config_file, training
from lora_ext.cli.formatter import HelpFormatter
from lora_ext.tasks import TaskError
from lora_ext.tasks.causal_lm.settings import LONG_TEXTS, TASK, CausalSettings, only_causal
from lora_ext.tasks.finetune.settings import SETTINGS_FILE, Settings, saved_task, saved_threads
from lora_ext.tasks.shared import team

_CLASSIFICATION = "classification"


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune",
        help="fine-tune a text classifier or a language model, and report its quality and cost",
        description="Fine-tunes a text classifier, or with --task causal-lm a decoder on chats, prompts with "
        "completions, or plain text. Without --model and --data: the demo model on the demo data of the task.",
        formatter_class=HelpFormatter,
    )
    config_file.add_config(parser)
    add = parser.add_argument
    tasks = [_CLASSIFICATION, TASK]
    add("--task", choices=tasks, default=_CLASSIFICATION, help="what is trained; changes some defaults below")
    training.add_options(parser)
    _add_causal_options(parser.add_argument_group(f"options of --task {TASK}", _other_defaults()))
    training.add_threads(parser)
    add("--no-measure", dest="measure", action="store_false", help="leave out the timing at the end")
    training.add_out(parser, "the adapter, metrics, loss curve and predictions")
    parser.set_defaults(run=run)


def _other_defaults() -> str:
    usual, causal = asdict(Settings()), asdict(CausalSettings())
    other = [f"--{n.replace('_', '-')} {causal[n]}" for n in usual if usual[n] != causal[n] and causal[n] is not None]
    return f"other defaults of this task: {', '.join(other)}"


def _add_causal_options(group: argparse._ArgumentGroup) -> None:
    """Adds options without defaults: an option that is not None was given."""
    defaults = CausalSettings()
    cut = f"texts of more than --max-length ({defaults.max_length}) tokens: {', '.join(LONG_TEXTS)} (the end)"
    group.add_argument("--long-texts", metavar="WHAT", help=f"{cut}; default: {defaults.long_texts}")
    packing = "put several texts into a row of --max-length tokens; none sees another"
    group.add_argument("--packing", action="store_true", default=None, help=packing)
    template = "Jinja chat template to use instead of the tokenizer's"
    group.add_argument("--chat-template-file", metavar="FILE", help=template)
    answers = f"test prompts answered before and after training; default: {defaults.answers}"
    group.add_argument("--answers", type=int, metavar="N", help=answers)
    longest = f"longest answer; default: {defaults.max_new_tokens}"
    group.add_argument("--max-new-tokens", type=int, metavar="TOKENS", help=longest)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    if team.was_restarted() and (args.out / SETTINGS_FILE).is_file():
        parse_again = _resuming(parse_again)
        args = parse_again()
    started = saved_task(args.out) if args.resume else None
    if args.resume and args.task == TASK != started:
        raise TaskError(
            f"--resume: the run in {args.out} was started with --task {started or _CLASSIFICATION}, now {TASK}"
        )
    is_causal = TASK in (args.task, started)
    kind = CausalSettings if is_causal else Settings
    if args.resume:
        saved = asdict(kind.load(args.out))
        args = parse_again(**saved)  # options of the run need not be repeated ...
        given = training.options_of(args, kind=kind)
        if changed := [name for name, value in saved.items() if given[name] != value]:
            were = ", ".join(f"--{name.replace('_', '-')} {saved[name]}, now {given[name]}" for name in changed)
            raise TaskError(f"--resume: the run in {args.out} was started with {were}")  # ... and must not change
    elif is_causal:
        args = parse_again(**{field.name: field.default for field in fields(CausalSettings)})
    else:
        for name in only_causal():
            if name != "task" and getattr(args, name) is not None:
                raise TaskError(f"--{name.replace('_', '-')} goes with --task {TASK}")
    settings = kind(**training.options_of(args, kind=kind))
    training.check_installed("finetune")
    if is_causal:
        training.check_installed(f"finetune --task {TASK}", "finetune-lm", ["rouge_score"])
    training.use_threads(args.threads, saved_threads(args.out) if args.resume else None)
    if is_causal:
        from lora_ext.tasks.causal_lm.run import finetune
    else:
        from lora_ext.tasks.finetune.run import finetune  # imports transformers, which takes seconds

    with (
        team.joined(args.out, args.resume) as out,
        training.saying_how_to_resume("finetune", args.out, SETTINGS_FILE, args.resume),
    ):
        finetune(settings, out, measure=args.measure and team.is_first(), **training.mode(args))


def _resuming(parse_again: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
    """Parses as if the command had --resume and not --overwrite."""

    def parse(**defaults: Any) -> argparse.Namespace:
        args = parse_again(**defaults)
        args.resume, args.overwrite = True, False
        return args

    return parse
