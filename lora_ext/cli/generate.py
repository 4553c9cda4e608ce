"""``lora-ext generate``"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lora_ext.cli import files, training
from lora_ext.cli.formatter import HelpFormatter
from lora_ext.tasks import TaskError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer prompts with a language model and its adapters",
        description="Answers prompts with a decoder and its adapters, and prints every answer as it comes. Prompts are "
        "arguments, the lines of a file, or standard input. Ctrl-C ends it.",
        formatter_class=HelpFormatter,
    )
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="without any, and without --prompts: standard input")
    model = "a directory or hub id that transformers loads, or a .gguf file, which is dequantised"
    add("--model", required=True, metavar="PATH_OR_ID", help=model)
    adapters = "an adapter in PEFT's format, or NAME=DIR; repeatable: every prompt is answered with each"
    add("--adapter", dest="adapters", action="append", default=[], metavar="DIR", help=adapters)
    weights = "answer with the sum of the adapters' updates, weighted by these, instead of with each"
    add("--weights", type=numbers, metavar="0.5,0.5", help=weights)
    add("--base", action="store_true", help="answer without an adapter, too")
    add("--merge", action="store_true", help="add an adapter to the weights before it answers")
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    file = ".jsonl with prompt or messages in every line, or a text file with a prompt a line; -: standard input"
    add("--prompts", dest="prompt_file", metavar="FILE", help=file)
    add("--whole", action="store_true", help="the text file, or standard input, is one prompt")
    add("--chat", action="store_true", help="make texts the user's message, by the tokenizer's chat template")
    add("--system", metavar="TEXT", help="system message; implies --chat")
    add("--chat-template-file", metavar="FILE", help="Jinja chat template to use instead of the tokenizer's")
    group = parser.add_argument_group("generation")
    add = group.add_argument
    add("--max-new-tokens", type=training.at_least_1, default=128, metavar="TOKENS", help="longest answer")
    add("--temperature", type=float, default=0.0, help="sample at this temperature; 0: take the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens with this probability")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens; 0: from all")
    add("--seed", type=int, default=0, help="seed of every answer")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="dtype of the weights")
    training.add_threads(parser, resumes=False)
    parser.add_argument("--json", action="store_true", help="print the answers as JSON when all are complete")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    training.check_installed("generate", names=["transformers"])
    training.use_threads(args.threads)
    from lora_ext.tasks.generate.run import GenerateSettings, generate  # imports transformers, which takes seconds

    names = {field.name for field in fields(GenerateSettings)}
    options: dict[str, Any] = {name: value for name, value in vars(args).items() if name in names}
    settings = GenerateSettings(**options | {"adapters": tuple(args.adapters)})
    prompts = _prompts(args)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731  standard output is the answers
    if args.json:
        files.print_json(generate(settings, prompts, say=say))
        return
    written = False

    def stream(text: str) -> None:
        nonlocal written
        written = written or bool(text)
        print(files.showable(text, keep="\n\t"), end="", flush=True)

    def heading(line: str) -> None:
        files.tell(f"\n--- {line}" if written else f"--- {line}")

    try:
        generate(settings, prompts, stream=stream, heading=heading, say=say)
    except KeyboardInterrupt:
        if written:
            print(flush=True)
        raise


def _prompts(args: argparse.Namespace) -> list[Any]:
    from lora_ext.tasks.generate.prompts import from_texts, read_prompts, read_stream

    if args.prompts and args.prompt_file is not None:
        raise TaskError("--prompts names a file, and there are prompts as arguments; give one of them")
    if args.prompts:
        if args.whole:
            raise TaskError("--whole goes with --prompts or standard input")
        return from_texts(args.prompts)
    if args.prompt_file in (None, "-"):
        if args.prompt_file is None and sys.stdin.isatty():
            raise TaskError("no prompt: give one as an argument, a file with --prompts, or text on standard input")
        return read_stream(sys.stdin, args.whole)
    return read_prompts(Path(args.prompt_file), args.whole)


def numbers(text: str) -> tuple[float, ...]:
    """Parses ``0.5,0.5``."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, want numbers such as 0.5,0.5") from None
