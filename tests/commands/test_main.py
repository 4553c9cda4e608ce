"""The command line: help, version, mistakes, exit statuses, the ends of the output."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.processes import Forked, run_python

import lora_ext
from lora_ext import commands
from lora_ext.commands import main
from lora_ext.commands.options import CommandError, Parser, names_of, refusing, size
from lora_ext.commands.results import read_json, tell, write_json

pytestmark = pytest.mark.cpu_only("tests the command line")

RUN = "import sys; from lora_ext.commands import main; sys.exit(main())"


def test_help_names_every_command_and_status(capsys):
    for arguments in ([], ["-h"], ["--help"]):
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        for name in ("finetune", "compare", "plan", "analyze", "report", "merge", "extract", "inspect", "info"):
            assert re.search(rf"^  {name} +\w", printed, re.M)
        assert "Exit status: 0: done; 1: the disk cannot be written" in printed
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lora-ext {lora_ext.__version__}\n"


WANTED = "want one of finetune, compare, plan, analyze, report, merge, extract, normalise, inspect, info\n"


@pytest.mark.parametrize(
    ("name", "said"), [("finetun", "'finetun'; did you mean finetune?"), ("\x1b[31m", "'\\x1b[31m'")]
)
def test_an_unknown_command(capsys, name, said):
    assert main([name]) == 2
    assert capsys.readouterr() == ("", f"lora-ext: error: there is no command {said}; {WANTED}")


def command(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    """Runs ``info`` with an error in it."""

    def fail(json: bool) -> str:
        raise error

    monkeypatch.setattr("lora_ext.info.info", fail)
    return main(["info"])


def test_exit_statuses(monkeypatch, capsys):
    assert command(monkeypatch, CommandError("it is red\nlight")) == 2
    assert capsys.readouterr().err == "lora-ext info: error: it is red\\nlight\n"
    assert command(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "lora-ext: interrupted\n"
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        assert command(monkeypatch, OSError(number, os.strerror(number), "out/a.json")) == 1
        assert capsys.readouterr().err == f"lora-ext: error: out/a.json: {os.strerror(number)}\n"
    monkeypatch.setenv("RANK", "1")  # another process of torchrun does not repeat it
    assert command(monkeypatch, CommandError("it is red")) == 2 and capsys.readouterr().err == ""
    for bug in (ValueError("a bug"), OSError(errno.EBADF, "a bug")):
        with pytest.raises(type(bug), match="a bug"):
            command(monkeypatch, bug)


@pytest.mark.full
def test_a_full_output_is_an_error_and_a_reader_that_ends_is_none():
    reading, writing = os.pipe()
    os.close(reading)
    full = os.open("/dev/full", os.O_WRONLY)
    ends = {}
    for output in (writing, full):
        done = Forked("-c", RUN, "info", stdout=output, stderr=subprocess.PIPE)
        os.close(output)
        _, errors = done.communicate()
        ends[output] = done.returncode, errors
    assert ends == {writing: (0, ""), full: (1, "lora-ext: error: standard output: No space left on device\n")}


@pytest.mark.full
def test_nothing_heavy_is_imported_for_the_small_commands():
    heavy = {"transformers", "matplotlib", "datasets", "trl", "jinja2.environment"}
    code = "import sys; from lora_ext.commands import main; main(['info']); main(['--help'])\n"
    done = run_python("-c", f"{code}print({heavy} & {{*sys.modules}})")
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def test_waiting_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    started = []
    monkeypatch.setattr(commands, "main", lambda: 0)
    monkeypatch.setattr(os, "execv", lambda path, line: started.append((line[1:], os.environ["OMP_WAIT_POLICY"])))
    for line, variable, again in (
        ("finetune --epochs 1", "X", True),
        ("analyze", "X", True),
        ("finetune", "OMP_WAIT_POLICY", False),
        ("finetune", "GOMP_SPINCOUNT", False),
        ("finetune --help", "X", False),
        ("info", "X", False),
        ("", "X", False),
    ):
        with monkeypatch.context() as patch:
            for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
                patch.delenv(name, raising=False)
            patch.setenv(variable, "1")
            patch.setattr(sys, "argv", ["lora-ext", *line.split()])
            patch.setattr(sys, "orig_argv", ["python", "-m", "lora_ext", *line.split()])
            assert commands.command() == 0
            assert started == ([(["-m", "lora_ext", *line.split()], "passive")] if again else [])
            os.environ.pop("OMP_WAIT_POLICY", None)
        started.clear()


# --- what commands share ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("rank is 0, want 1\nand more"), "rank is 0, want 1"),
        (OSError(errno.ENOENT, "No such file", "a.json"), "a.json: No such file"),
        (OSError("b.json is a GGUF file"), "b.json is a GGUF file"),
        (ImportError(), "ImportError"),
        (KeyError("no key"), "no key"),
        (ValueError("these are wrong:\n  a\n  b"), "these are wrong: a; b"),
        (ValueError("wrong:\n  a\n  b\n  c\n  d\n  e\nremove them"), "wrong: a; b; c; and 2 more; remove them"),
    ],
)
def test_refusing_makes_one_line(error, line):
    with pytest.raises(CommandError) as refused, refusing("", KeyError):
        raise error
    assert str(refused.value) == line
    with pytest.raises(CommandError, match="^--x: "), refusing("--x", KeyError):
        raise error
    for no_mistake in (OSError(errno.ENOSPC, "full"), BrokenPipeError(), RuntimeError("a bug"), KeyError()):
        with pytest.raises(type(no_mistake)) as raised, refusing("--x"):
            raise no_mistake
        assert raised.value is no_mistake


def test_values_of_options():
    assert [size(text) for text in ("5GB", "1.5 kib", "7", "2T")] == [5 * 10**9, 1536, 7, 2 * 10**12]
    assert names_of(" query, value,,") == ["query", "value"]
    parser = Parser(prog="x")
    parser.add_argument("--size", type=size, default="1GB", help="bytes")
    parser.add_argument("--dtype", help="dtype")
    assert "bytes (default: 1GB)" in parser.format_help() and "None" not in parser.format_help()


def test_results_are_json(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"é": float("nan"), "path": Path("x")})
    assert (tmp_path / "new" / "a.json").read_text() == '{\n  "\\u00e9": null,\n  "path": "x"\n}\n'
    assert read_json(tmp_path / "new" / "a.json") == {"é": None, "path": "x"}


def test_names_that_the_output_cannot_show_are_escaped(monkeypatch):
    said = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", said)
    tell("mô hình\x1b[31m\n\tx")
    assert said.buffer.getvalue() == b"m\\xf4 h\\xecnh\\x1b[31m\n\tx\n"
