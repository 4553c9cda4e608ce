"""``lora-ext report``: shows results on one HTML page that loads nothing and runs no script."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lora_ext._common.printable import escaped
from lora_ext.commands import analyze, pictures, plan
from lora_ext.commands.options import CommandError, Parser
from lora_ext.commands.results import measured_on, read_json, readable, tell, write_text

_GENERATOR = "lora-ext report"
_WIDE = 600  # points; on a phone, the page scrolls wider figures instead of making them smaller
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
    add("--out", type=Path, metavar="FILE", help="the page; replaces an earlier report (default: DIR/report.html)")
    add("--title", metavar="TEXT", help="title of the page (default: the directory's name)")
    args = parser.parse_args(argv)
    out = args.out or args.directory / "report.html"
    found = _find(args.directory)
    if out.exists() and (out.is_dir() or _GENERATOR not in out.read_text("utf-8", "replace")[:5000]):
        raise CommandError(f"--out {out} exists and is no report; choose another file")
    sections = [_section(path, args.directory, f"f{number}") for number, path in enumerate(found, 1)]
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


def _section(path: Path, top: Path, name: str) -> dict[str, Any]:
    """Reads a file of results. Returns what the template shows of it."""
    result = _printable(read_json(path))
    try:
        section = {"text": "", "facts": {}, "notes": ()} | _SECTIONS[path.name](result)
        drawn = {what: figure for what, figure in section.get("figures", {}).items() if figure is not None}
        return section | {
            "where": str(path.relative_to(top)),
            "command": shlex.join(result.get("command", ())),
            "measured": measured_on(result) if "machine" in result else result.get("date", ""),
            "figures": [
                (pictures.svg(figure, f"{name}-{number}", what), 72 * figure.get_figwidth() > _WIDE)
                for number, (what, figure) in enumerate(drawn.items(), 1)
            ],
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
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["digest"] = _digest
    template = environment.get_template("report.html")
    return template.render(title=escaped(title), sections=sections, generator=_GENERATOR)


def _digest(text: str) -> str:
    """Returns the source expression that allows an inline style (Content-Security-Policy, level 3)."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- one function for each file of results ----------------------------------------------------------------------------


def _metrics(result: _Result) -> dict[str, Any]:
    trained, total = result["trainable_parameters"], result["total_parameters"]
    own = {key: value for key, value in result.get("options", {}).items() if key not in ("task", "method")}
    numbers = ("head_parameters", "train_seconds", "tokens_per_second", "steps", "global_batch_size")
    head, seconds, speed, steps, batch = (_number(result.get(key)) for key in numbers)
    facts = {
        "task": result["task"],
        "method": result["method"],
        "options": ", ".join(f"{key} {value}" for key, value in own.items() if value is not None),
        "trained parameters": f"{trained:,} of {total:,} ({trained / total:.3%}), {head or 0} of them in the new head",
        "examples": ", ".join(f"{count:,} for {part}" for part, count in result.get("examples", {}).items()),
        "training": f"{seconds} s, {speed} tokens/s, {steps} steps of {batch} examples",
    }
    keys = {"peak memory": "peak_memory_bytes", "adapter": "adapter_bytes", "full checkpoint": "full_checkpoint_bytes"}
    sizes = {name: readable(result[key]) for name, key in keys.items() if result.get(key)}
    curve = pictures.loss_curve(result["history"], "Loss") if result.get("history") else None
    return {
        "heading": f"A run of {result['method']}",
        "facts": facts | sizes,
        "tables": _classes(result) if "confusion" in result["test"] else _answers(result),
        "figures": {"training and validation loss by epoch": curve},
    }


def _classes(result: _Result) -> list[Table]:
    test, majority = result["test"], result.get("majority") or {}
    scores = ("accuracy", "macro_f1", "weighted_f1")
    rows = [["this run", *(_percent(test.get(key)) for key in scores)]]
    if majority:
        rows.append([f"always “{majority['label']}”", *(_percent(majority.get(key)) for key in scores)])
    names = ("precision", "recall", "f1-score")
    classes = [
        [label, *(_percent(one[name]) for name in names), _number(one["support"])]
        for label, one in test["per_class"].items()
    ]
    labels = result["labels"]
    counts = [[label, *map(_number, row)] for label, row in zip(labels, test["confusion"], strict=True)]
    return [
        Table("Scores on the test texts", ["", "accuracy (%)", "macro F1 (%)", "weighted F1 (%)"], rows),
        Table("By class", ["class", "precision (%)", "recall (%)", "F1 (%)", "texts"], classes),
        Table("Texts of a class (rows) by the answer (columns)", ["", *labels], counts),
    ]


def _answers(result: _Result) -> list[Table]:
    scores = {"perplexity": "perplexity", "rouge_l": "ROUGE-L (%)", "exact_match": "exact match (%)"}
    parts = {"before": result.get("before") or {}, "after": result["test"]}
    rows = [[name, *(_score(key, part.get(key)) for key in scores)] for name, part in parts.items()]
    heading = ("prompt", "reference", "before", "after")
    samples = [[sample.get(key) or "" for key in heading] for sample in result.get("samples") or ()]
    return [
        Table("Scores on the test examples", ["fine-tuning", *scores.values()], rows),
        Table("Answers before and after fine-tuning", heading, samples, words=True),
    ]


def _compare(result: _Result) -> dict[str, Any]:
    rows, metric = [row for row in result["rows"] if row.get("mean") is not None], result["metric"]
    unit = "" if metric == "perplexity" else " (%)"
    heading = ["", "trained parameters", "seeds", f"{metric.replace('_', ' ')}{unit}", f"spread{unit}"]
    heading += [f"difference{unit}", "95 % interval", "macro F1 (%)", "training (s)", "tokens/s"]
    heading += ["peak memory (MB)", "adapter (MB)"]
    cells = [
        [
            row["label"],
            _number(row["trainable_parameters"]),
            str(len(row["seeds"])),
            *(_score(metric, row.get(key)) for key in ("mean", "spread", "difference")),
            " to ".join(_score(metric, end) for end in row.get("interval") or ()),
            _percent(row.get("macro_f1")),
            *(_number(row.get(key)) for key in ("train_seconds", "tokens_per_second")),
            *(_number(row[key] / 1e6 if row.get(key) else None) for key in ("peak_memory_bytes", "adapter_bytes")),
        ]
        for row in rows
    ]
    failed = [[run["label"], str(run["seed"]), run["reason"]] for run in result.get("failed") or ()]
    return {
        "heading": "Comparison of methods",
        "text": "Means over the seeds, on the test examples; the spread is the largest minus the smallest. The "
        f"difference to {result.get('baseline')} is paired by seed; where its 95 % interval contains 0, it may be "
        f"chance. {'Less' if metric == 'perplexity' else 'More'} is better.",
        "tables": [Table("Methods", heading, cells), Table("Failed", ["run", "seed", "reason"], failed, words=True)],
        "figures": {
            "scores by trained parameters": pictures.scores_against_parameters(rows, metric) if rows else None,
            "scores by rank": pictures.ranks(rows, metric),
            "scores by matrices": pictures.matrices(rows, metric),
        },
    }


def _analysis(result: _Result) -> dict[str, Any]:
    return {
        "heading": "What the adapters have learnt",
        "text": analyze.READING,
        "facts": {"base": result["base"] or "none"},
        "notes": result["notes"],
        "tables": [Table(caption, *cells) for caption, cells in analyze.tables(result).items()],
        "figures": {name.removesuffix(".png").replace("_", " "): one for name, one in analyze.figures(result).items()},
    }


def _plan(result: _Result) -> dict[str, Any]:
    heading, *rows = plan.rows(result)
    return {
        "heading": "Predicted memory",
        "notes": [f"{plan.title(result)}.", *plan.notes(result)],
        "tables": [Table("Memory of a step, and checkpoints", heading, rows)],
    }


_SECTIONS: dict[str, Callable[[_Result], dict[str, Any]]] = {
    "compare.json": _compare,
    "analysis.json": _analysis,
    "plan.json": _plan,
    "metrics.json": _metrics,
}


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _score(metric: str, value: float | None) -> str:
    return _percent(value) if metric != "perplexity" or value is None else f"{value:.2f}"
