"""``lora-ext info``: shows what was built, and which kernels run on this machine."""

from __future__ import annotations

from lora_ext import info
from lora_ext.commands.options import CommandError, Parser
from lora_ext.commands.results import tell


def main(argv: list[str]) -> None:
    parser = Parser(prog="lora-ext info", description="Shows what was built, and which kernels run on this machine.")
    add = parser.add_argument
    add("--json", action="store_true", help="print JSON")
    add("--plan", metavar="M,K,N[,RANK]", help="print the CUDA launches of a layer K -> N for M tokens, and exit")
    add("--sms", metavar="N", help="streaming multiprocessors of the GPU of --plan; the default is an H100's 132")
    args = parser.parse_args(argv)
    if args.plan is None:
        tell(info.info(json=args.json))
        return
    numbers = args.plan.split(",")
    if len(numbers) not in (3, 4) or not all(number.strip().isdecimal() and int(number) > 0 for number in numbers):
        raise CommandError(f"--plan is {args.plan!r}, want M,K,N or M,K,N,RANK: positive numbers")
    if args.sms is not None and not (args.sms.isdecimal() and int(args.sms) > 0):
        raise CommandError(f"--sms is {args.sms!r}, want a positive number")
    sms = None if args.sms is None else int(args.sms)
    tell(info.plan(*map(int, numbers), sms=sms))
