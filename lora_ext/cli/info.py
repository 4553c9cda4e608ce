"""``lora-ext info``"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lora_ext import info


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="show what was built, and which kernels run on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    print(info.info(json=args.json), flush=True)
