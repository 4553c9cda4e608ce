"""``lora-ext info``"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from lora_ext import info
from lora_ext.tasks import TaskError


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("info", help="show what was built, and which kernels run on this machine")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plan", metavar="M,K,N[,RANK]", help="print which CUDA kernels a layer K -> N takes for M tokens, and exit"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, parse_again: Callable[..., argparse.Namespace]) -> None:
    if args.plan is None:
        print(info.info(json=args.json), flush=True)
        return
    numbers = args.plan.split(",")
    if len(numbers) not in (3, 4) or not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise TaskError(f"--plan is {args.plan!r}, want M,K,N or M,K,N,RANK: positive numbers")
    print(info.plan(*map(int, numbers)), flush=True)
