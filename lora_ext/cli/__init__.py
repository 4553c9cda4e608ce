"""``lora-ext ...``: each command's module parses its arguments and runs it. Errors are reported here."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from typing import Any

from lora_ext.cli import (
    analyze,
    compare,
    config_file,
    diff,
    extract,
    files,
    finetune,
    generate,
    info,
    inspect,
    merge,
    report,
    sweep,
    unmerge,
)
from lora_ext.info import gather
from lora_ext.tasks import TaskError
from lora_ext.tasks.shared import sigterm, team

_EXIT_DISK = 1
_STATUS = (
    "exit status: 0: done; 1: the disk cannot be written; diff: the two differ; unmerge: not exact; 2: an error in the "
    "options or the files; 3: compare left out methods that do not suit the checkpoint; 130: Ctrl-C; 143: SIGTERM"
)

_COMMANDS = (
    *(info, finetune, generate, compare, sweep, analyze, report),
    *(merge, unmerge, extract, inspect, diff),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status, which ``_STATUS`` explains."""
    parser = argparse.ArgumentParser(prog="lora-ext", description="LoRA in fused kernels.", epilog=_STATUS)
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in _COMMANDS:
        module.add_parser(commands)
    argv = list(sys.argv[1:] if argv is None else argv)

    def parse_again(**defaults: Any) -> argparse.Namespace:
        commands.choices[argv[0]].set_defaults(**defaults)
        return parse()

    def parse() -> argparse.Namespace:
        with redirect_stderr(io.StringIO()) if team.is_silent() else nullcontext():
            return parser.parse_args(argv)

    try:
        if argv and argv[0] in commands.choices:
            argv[1:] = config_file.with_config(commands.choices[argv[0]], argv[1:])
        args = parse()
        if (number := team.started()) > 1 and args.command != "finetune":
            raise TaskError(f"{args.command} runs in one process, not in {number}; start it without torchrun")
        files.unsaid.clear()
        status = args.run(args, parse_again) or 0
        if files.unsaid:
            raise files.unsaid[0]
        sys.stdout.flush()
        return status
    except TaskError as error:
        if not team.is_repeated(error):
            print(f"lora-ext: error: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print("lora-ext: interrupted", file=sys.stderr)
        return 128 + (signal.SIGTERM if sigterm.received() else signal.SIGINT)
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        _silence()
    except OSError as error:
        if error.filename is None:  # standard output, or a bug
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
                raise
            _silence()  # or Python tries to write the rest at its end
        where = "standard output" if error.filename is None else error.filename
        print(f"lora-ext: error: {where}: {error.strerror}", file=sys.stderr)
        return _EXIT_DISK
    return 0


class _Version(argparse.Action):
    """Prints the version."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"lora-ext {gather()['version']}")
        parser.exit()


def _silence() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command() -> int:
    """The command ``lora-ext``."""
    _let_threads_sleep()
    return main()


def _let_threads_sleep() -> None:
    """Makes waiting threads of PyTorch's pool sleep, in this process and in those that it starts.

    By default GNU's OpenMP, which PyTorch uses, lets waiting threads spin for a while. On a busy machine they take time
    from the threads that they wait for. On two busy cores a step of the demo model took 9.8 s with two spinning threads
    and 2.2 s with two sleeping ones; on an idle machine both took the same time.

    OpenMP reads its environment when it is loaded, which has happened by now. So finetune and generate, which compute
    in this process, replace it by a new one.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        return
    os.environ["OMP_WAIT_POLICY"] = "passive"
    if sys.argv[1:2] in (["finetune"], ["generate"]) and not {"-h", "--help"} & {*sys.argv}:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    sys.exit(command())
