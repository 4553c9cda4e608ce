"""``lora-ext COMMAND ...``: each command is a module of this folder with a ``main(argv)``; nothing imports them.

A command parses options, calls the library and Transformers, TRL, datasets or Jinja2, and writes results.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Sequence

from lora_ext._common.messages import escaped, suggestion
from lora_ext.commands.options import DISK_ERRORS, CommandError, is_first_process

COMMANDS = {
    "finetune": "fine-tune a classifier or a language model",
    "compare": "fine-tune with several methods and seeds, and tabulate accuracy and costs",
    "plan": "predict the memory of fine-tuning",
    "analyze": "measure what adapters have learnt: the paper's section 7",
    "report": "show results as one HTML page",
    "merge": "merge adapters into a checkpoint on disk",
    "extract": "make an adapter from the difference of two checkpoints",
    "normalise": "write an adapter that engines with fewer options read alike",
    "inspect": "show the contents of an adapter or a checkpoint",
    "info": "show what was built, and which kernels run on this machine",
}
_USAGE = "usage: lora-ext COMMAND [options]\n\nLoRA in fused kernels.\n\ncommands:\n{}\n\n{}"
_STATUS = (
    "`lora-ext COMMAND --help` lists a command's options. Exit status: 0: done; 1: the disk cannot be written, or a "
    "run of compare failed; 2: an error in the options or the files; 130: Ctrl-C"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status."""
    name, *rest = [*(sys.argv[1:] if argv is None else argv)] or ["--help"]
    if name in ("-h", "--help"):
        print(_USAGE.format("\n".join(f"  {one:<9} {text}" for one, text in COMMANDS.items()), _STATUS))
        return 0
    if name == "--version":
        from lora_ext import __version__

        print(f"lora-ext {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise CommandError(
                f"there is no command {name!r}{suggestion(name, COMMANDS)}; want one of {', '.join(COMMANDS)}"
            )
        status = importlib.import_module(f"lora_ext.commands.{name}").main(rest) or 0
        sys.stdout.flush()
        return status
    except CommandError as error:
        if is_first_process():
            where, text = (f" {name}" if name in COMMANDS else ""), str(error).removeprefix(f"{name}: ")
            print(f"lora-ext{where}: error: {escaped(text)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lora-ext: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of the output has ended, as `head` does
        _silence()
        return 0
    except OSError as error:
        if error.errno not in (*DISK_ERRORS, errno.EACCES):
            raise
        if error.filename is None:
            _silence()
        print(f"lora-ext: error: {error.filename or 'standard output'}: {error.strerror}", file=sys.stderr)
        return 1


def _silence() -> None:
    """Sends the rest of the standard output to nowhere: Python writes it at its end, and would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command() -> int:
    """The command ``lora-ext``: lets waiting threads sleep, and runs :func:`main`.

    By default GNU's OpenMP, which PyTorch uses, lets waiting threads spin; on a busy machine they take time from the
    threads that they wait for. OpenMP has read its environment by now, so this process replaces itself by a new one.
    """
    computes = (
        sys.argv[1:2] and sys.argv[1] in COMMANDS and sys.argv[1] != "info" and not {"-h", "--help"} & {*sys.argv}
    )
    if computes and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & {*os.environ}:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return main()
