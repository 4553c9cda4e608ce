"""``lora-ext ...``: each command's module parses its arguments and calls what they ask for; mistakes are told here."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..tasks import TaskError
from . import analyze, compare, diff, extract, finetune, info, inspect, merge, plan, report, sweep, unmerge

_EXIT_MISTAKE, _EXIT_INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or what the command says; 2 after a mistake, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="lora-ext", description="LoRA in fused kernels.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (info, finetune, compare, sweep, analyze, plan, report, merge, unmerge, extract, inspect, diff):
        module.add_parser(commands)
    args = parser.parse_args(argv)

    def parse_again(**defaults: Any) -> argparse.Namespace:
        commands.choices[args.command].set_defaults(**defaults)
        return parser.parse_args(argv)

    try:
        return args.run(args, parse_again) or 0
    except TaskError as error:
        print(f"lora-ext: error: {error}", file=sys.stderr)
        return _EXIT_MISTAKE
    except KeyboardInterrupt:
        print("lora-ext: interrupted", file=sys.stderr)
        return _EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
