"""``lora-ext report``: shows results on one HTML page that loads nothing and runs no script."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ext._common.messages import escaped
from lora_ext.commands import analyze, comparison_table, plan
from lora_ext.commands.options import CommandError, Parser, check_installed, refusing
from lora_ext.commands.results import measured_on, read_json, readable, tell, write_text

_Result = Mapping[str, Any]


# Cells as text; the first of a row is its heading. Cells that hold sentences (words) break into lines.
Table = namedtuple("Table", ("caption", "heading", "rows", "words"), defaults=[False])


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="lora-ext report",
        description="Shows the results of finetune, compare, analyze and plan in a directory and below on one HTML "
        "page, which needs no other file and no network.",
    )
    add = parser.add_argument
    add("directory", type=Path, metavar="DIR", help="--out of one of these commands, or a directory with several")
    add("--out", type=Path, metavar="FILE", help="the page; replaces an earlier one (default: DIR/report.html)")
    add("--title", metavar="TEXT", help="title of the page (default: the directory's name)")
    args = parser.parse_args(argv)
    check_installed("report", "jinja2", "matplotlib")
    out = args.out or args.directory / "report.html"
    found = _find(args.directory)
    if out.exists() and (out.is_dir() or 'content="lora-ext report"' not in out.read_text("utf-8", "replace")):
        raise CommandError(f"--out {out} exists and is no report; name another file")
    sections = [_section(path, args.directory) for path in found]
    with refusing("--out"):
        write_text(out, _page(args.title or args.directory.resolve().name, sections))
    tell(f"{out}: {'; '.join(section['heading'] for section in sections)}")


def _find(directory: Path) -> list[Path]:
    """Returns the files of results in the order of the page. A comparison's table has the runs below it."""
    if not directory.is_dir():
        raise CommandError(f"{directory} is no directory; name the --out of a command")
    found = {name: sorted(directory.rglob(name)) for name in _SECTIONS}
    compared = [path.parent for path in found["compare.json"]]
    runs = found["metrics.json"]
    found["metrics.json"] = [path for path in runs if not any(path.is_relative_to(parent) for parent in compared)]
    if not any(found.values()):
        raise CommandError(f"{directory} and its directories hold none of {', '.join(_SECTIONS)}; run a command first")
    return [path for paths in found.values() for path in paths]


def _section(path: Path, top: Path) -> dict[str, Any]:
    """Reads a file of results. Returns what the template shows of it."""
    from lora_ext.commands.pictures import svg

    result = _printable(read_json(path))
    try:
        section = {"text": "", "facts": {}, "note": "", "figures": {}} | _SECTIONS[path.name](result)
        drawn = {what: svg(figure).encode() for what, figure in section["figures"].items() if figure is not None}
        return section | {
            "where": str(path.relative_to(top)),
            "command": shlex.join(result["command"]),
            "measured": measured_on(result),
            "figures": {what: base64.b64encode(image).decode() for what, image in drawn.items()},
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        raise CommandError(f"{path} is not what the command writes: {error!r}; make it again") from error


def _printable(value: Any) -> Any:
    """Escapes control characters in all texts of a result."""
    if isinstance(value, str):
        return escaped(value, keep="\n")
    if isinstance(value, dict):
        return {escaped(key): _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


def _page(title: str, sections: Sequence[_Result]) -> str:
    from jinja2 import StrictUndefined, Template

    source = Path(__file__).with_suffix(".html").read_text("utf-8")
    how = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return Template(source, **how).render(title=escaped(title), sections=sections, digest=_digest)


def _digest(text: str) -> str:
    """Returns the source expression that allows an inline style (Content-Security-Policy, level 3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- one function for each file of results ----------------------------------------------------------------------------


def _metrics(result: _Result) -> dict[str, Any]:
    from lora_ext.commands.pictures import loss_curve

    trained, total, head = (result[f"{name}_parameters"] for name in ("trainable", "total", "head"))
    options = [f"{key} {value}" for key, value in result["options"].items() if value is not None]
    training = f"{result['train_seconds']:,.0f} s, {result['tokens_per_second']:,.0f} tokens/s"
    return {
        "heading": f"A run of {result['method']}",
        "facts": {
            "method": ", ".join([result["method"], *options]),
            "trained parameters": f"{trained:,} of {total:,} ({trained / total:.3%}), {head:,} of them in the new head",
            "examples": ", ".join(f"{count:,} for {part}" for part, count in result["examples"].items()),
            "training": f"{training}, {result['steps']:,} steps of {result['global_batch_size']} examples",
            "peak memory": readable(result["peak_memory_bytes"]),
            "adapter": readable(result["adapter_bytes"]),
            "full checkpoint": readable(result["full_checkpoint_bytes"]),
        },
        "tables": _scores(result),
        "figures": {"training and validation loss by epoch": loss_curve(result["history"], "Loss")},
    }


def _scores(result: _Result) -> list[Table]:
    test, is_classifier = result["test"], result["task"] == "classification"
    other = result["majority"] if is_classifier else result["before"]
    scores = [[key.replace("_", " "), _score(key, other), _score(key, test)] for key in test if key in other]
    name = f"always “{other['label']}”" if is_classifier else "before fine-tuning"
    table = Table("Scores on the test texts", ["", name, "this run"], scores)
    if not is_classifier:
        heading = ("prompt", "reference", "before", "after")
        samples = [[sample[key] for key in heading] for sample in result["samples"]]
        return [table, Table("Answers before and after fine-tuning", heading, samples, words=True)]
    names = ("precision", "recall", "f1-score")
    classes = [
        [label, *(_score(name, one) for name in names), f"{one['support']:,.0f}"]
        for label, one in test["per_class"].items()
    ]
    counts = [[label, *map(str, row)] for label, row in zip(result["labels"], test["confusion"], strict=True)]
    confusion = Table("Texts of a class (rows) by the answer (columns)", ["", *result["labels"]], counts)
    return [table, Table("By class", ["class", *names, "texts"], classes), confusion]


def _score(name: str, scores: _Result) -> str:
    if scores[name] is None:
        return "not finite"
    return f"{scores[name]:.2f}" if name == "perplexity" else f"{scores[name]:.1%}"


def _compare(result: _Result) -> dict[str, Any]:
    from lora_ext.commands import pictures

    rows, metric = [row for row in result["rows"] if row["mean"] is not None], result["metric"]
    heading, cells, _ = comparison_table.tabulate(rows, metric)
    failed = [[run["label"], str(run["seed"]), run["reason"]] for run in result["failed"]]
    return {
        "heading": "Comparison of methods",
        "text": "Means over the seeds, on the test examples; the spread is the largest minus the smallest. The "
        f"difference to {result['baseline']} is paired by seed; where its 95 % interval contains 0, it may be "
        f"chance. {'Less' if metric == 'perplexity' else 'More'} is better.",
        "tables": [Table("Methods", heading, cells), Table("Failed", ["run", "seed", "reason"], failed, words=True)],
        "figures": {
            "scores by trained parameters": pictures.scores_against_parameters(rows, metric),
            "scores by rank": pictures.ranks(rows, metric),
            "scores by matrices": pictures.matrices(rows, metric),
        },
    }


def _analysis(result: _Result) -> dict[str, Any]:
    return {
        "heading": "What the adapters have learnt",
        "text": analyze.READING,
        "facts": {"adapters": ", ".join(result["paths"]), "base": result["base"] or "none"},
        "note": result["note"],
        "tables": [Table(caption, *cells) for caption, cells in analyze.tables(result).items()],
        "figures": analyze.figures(result),
    }


def _plan(result: _Result) -> dict[str, Any]:
    heading, *rows = plan.rows(result)
    return {
        "heading": "Predicted memory",
        "note": "\n".join([plan.title(result), *plan.notes(result)]),
        "tables": [Table("Memory of a step, and checkpoints", heading, rows)],
    }


_SECTIONS: dict[str, Callable[[_Result], dict[str, Any]]] = {
    "compare.json": _compare,
    "analysis.json": _analysis,
    "plan.json": _plan,
    "metrics.json": _metrics,
}
