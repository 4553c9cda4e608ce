"""``lora-ext report``: the results of the other commands as one HTML page that opens offline.

:mod:`.results` finds the files. ``methods``, ``ranks``, ``analysis``, ``memory`` and ``runs`` each turn one kind of
result into sentences, tables and charts; a Jinja2 template of ``templates/`` lays them out, and escapes. :mod:`.charts`
draws with matplotlib; :mod:`.page` puts the sections together.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import UndefinedError

from lora_ext.tasks import TaskError
from lora_ext.tasks.report.analysis import show_analysis
from lora_ext.tasks.report.facts import data_of, model_of
from lora_ext.tasks.report.memory import show_memory
from lora_ext.tasks.report.methods import show_methods
from lora_ext.tasks.report.page import GENERATOR, Section, page, render
from lora_ext.tasks.report.pictures import Pictures
from lora_ext.tasks.report.ranks import show_ranks
from lora_ext.tasks.report.results import Result, find_results
from lora_ext.tasks.report.runs import show_run
from lora_ext.tasks.shared.provenance import measured_on
from lora_ext.tasks.shared.whole_files import write_whole

__all__ = ["write_report"]

_SECTIONS: dict[str, tuple[str, Callable[[Result, Pictures], dict[str, Any]]]] = {
    "compare": ("Methods compared", show_methods),
    "sweep": ("LoRA by rank and by weights", show_ranks),
    "analyze": ("What the adapters learned", show_analysis),
    "plan": ("Memory", show_memory),
    "finetune": ("A single run", show_run),
}


def write_report(
    directory: Path, out: Path | None = None, title: str | None = None, say: Callable[[str], None] = print
) -> Path:
    """Shows the results in ``directory`` and below on one page. Equal results make equal pages.

    Args:
        out: the page; None: ``report.html`` in ``directory``. Only an earlier page of this command is replaced.
        title: the page's title; None: the directory's name.

    Returns:
        The page's path.

    Raises:
        TaskError: there is no result, or a file is not what its command writes; before anything is written.
        WriteError: the disk refuses the page.
    """
    results = find_results(directory)
    out = directory / "report.html" if out is None else out
    _check_out(out)
    pictures = Pictures()
    sections = [_section(result, directory, pictures) for result in results]
    title = f"LoRA: {directory.resolve().name}" if title is None else title
    try:
        facts = _facts(results)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TaskError(
            f"{', '.join(str(result.path) for result in results)}: one of them is not what its command writes "
            f"({type(error).__name__}: {error})"
        ) from error
    text = page(title, facts, sections)
    write_whole(out, text)
    shown = ", ".join(f"{section.heading} ({section.where})" for section in sections)
    say(f"{out}: {shown}; {len(text.encode()) / 1e6:.2f} MB")
    return out


def _check_out(out: Path) -> None:
    """Raises TaskError where ``out`` holds something else than a page of this command, or has no directory."""
    if out.is_dir():
        raise TaskError(f"--out {out} is a directory; name the file in it, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise TaskError(f"--out {out}: {out.parent} is not a directory; make it first")
    if out.exists() and not (out.is_file() and f'content="{GENERATOR}"'.encode() in out.read_bytes()[:4096]):
        raise TaskError(f"--out {out} exists and is not a page of lora-ext report; name another file")


def _section(result: Result, directory: Path, pictures: Pictures) -> Section:
    heading, show = _SECTIONS[result.command]
    content = result.content
    try:
        return Section(
            heading,
            str(result.path.relative_to(directory)),
            render(f"{result.command}.html", **show(result, pictures)),
            shlex.join(map(str, content["command"])) if "command" in content else None,
            measured_on(content) if "machine" in content and "date" in content else None,
        )
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UndefinedError) as error:
        raise TaskError(
            f"{result.path} is not what lora-ext {result.command} writes ({type(error).__name__}: {error}); run the "
            "command again, or move the file away"
        ) from error


def _facts(results: list[Result]) -> list[tuple[str, str]]:
    """Model, data, machine and date of all results; several values where they differ."""
    contents = [result.content for result in results]
    dates = sorted(str(content["date"])[:10] for content in contents if "date" in content)
    machines = [content["machine"] for content in contents if "machine" in content]
    facts = {
        "Model": [model_of(content) for content in contents],
        "Data": [data_of(content) for content in contents],
        "Machine": [f"{one['processor']}, {one['gpu'] or 'no GPU'}; torch {one['torch']}" for one in machines],
        "Date": [" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else [],
    }
    return [(name, "; ".join(dict.fromkeys(value for value in values if value))) for name, values in facts.items()]
