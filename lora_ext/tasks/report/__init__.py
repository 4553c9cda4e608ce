"""``lora-ext report``: what the other commands found, as one HTML page that opens offline.

:mod:`.results` finds the files; ``methods``, ``ranks``, ``analysis``, ``memory`` and ``runs`` show one kind each, with
the charts of ``line_chart``, ``bars`` and ``heat_map``; :mod:`.page` puts the sections together; :mod:`.markup` makes
every element, and escapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lora_ext.tasks import TaskError
from lora_ext.tasks.report.analysis import show_analysis
from lora_ext.tasks.report.facts import data_of, description_list, model_of
from lora_ext.tasks.report.markup import Html
from lora_ext.tasks.report.memory import show_memory
from lora_ext.tasks.report.methods import show_methods
from lora_ext.tasks.report.page import GENERATOR, Section, page
from lora_ext.tasks.report.pictures import Pictures
from lora_ext.tasks.report.ranks import show_ranks
from lora_ext.tasks.report.results import Result, find_results
from lora_ext.tasks.report.runs import show_run
from lora_ext.tasks.shared.whole_files import write_whole

__all__ = ["write_report"]

_SECTIONS: dict[str, tuple[str, Callable[[Result, Pictures], Html]]] = {
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
        out: the page; None: ``report.html`` in ``directory``. A page of ours there is replaced, and nothing else.
        title: of the page; None: the directory's name.

    Returns:
        The page's path.

    Raises:
        TaskError: there is no result, or a file is not what its command leaves; before anything is written.
        WriteError: the disk refuses the page.
    """
    results = find_results(directory)
    out = directory / "report.html" if out is None else out
    _check_out(out)
    pictures = Pictures()
    sections = [_section(each, directory, pictures) for each in results]
    title = f"LoRA: {directory.resolve().name}" if title is None else title
    try:
        facts = _facts(results)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise TaskError(
            f"{', '.join(str(each.path) for each in results)}: one of them is not what its command leaves "
            f"({type(error).__name__}: {error})"
        ) from error
    text = page(title, [description_list(facts)], sections)
    write_whole(out, text)
    say(f"{out}: {', '.join(f'{each.heading} ({each.where})' for each in sections)}; {len(text.encode()) / 1e6:.2f} MB")
    return out


def _check_out(out: Path) -> None:
    """TaskError: there is something else than a page of ours, or no directory for it."""
    if out.is_dir():
        raise TaskError(f"--out {out} is a directory; name the file in it, such as {out / 'report.html'}")
    if not out.parent.is_dir():
        raise TaskError(f"--out {out}: {out.parent} is no directory")
    if out.exists() and not (out.is_file() and f'content="{GENERATOR}"'.encode() in out.read_bytes()[:4096]):
        raise TaskError(f"--out {out} is there, and no page of lora-ext report; name another file")


def _section(result: Result, directory: Path, pictures: Pictures) -> Section:
    heading, show = _SECTIONS[result.command]
    try:
        content = show(result, pictures)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise TaskError(
            f"{result.path} is not what lora-ext {result.command} leaves ({type(error).__name__}: {error}); run the "
            "command again, or move the file away"
        ) from error
    return Section(heading, str(result.path.relative_to(directory)), content)


def _facts(results: list[Result]) -> list[tuple[str, str]]:
    """What all of the page is about; several values where the results differ."""
    contents = [each.content for each in results]
    dates = sorted(str(each["date"])[:10] for each in contents if "date" in each)
    machines = [each["machine"] for each in contents if "machine" in each]
    facts = {
        "Model": [model_of(each) for each in contents],
        "Data": [data_of(each) for each in contents],
        "Machine": [f"{each['processor']}, {each['gpu'] or 'no GPU'}; torch {each['torch']}" for each in machines],
        "Date": [" to ".join(dict.fromkeys([dates[0], dates[-1]]))] if dates else [],
    }
    return [(name, "; ".join(dict.fromkeys(value for value in values if value))) for name, values in facts.items()]
