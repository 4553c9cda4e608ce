"""How much does LoRA lose to full fine-tuning on UIT-VSFC, sentiments of student feedback in Vietnamese, and why?

    python benchmarks/vietnamese.py --estimate          # seconds a step of every method, and hours of the whole table
    python benchmarks/vietnamese.py --hours 10          # trains; the same command continues after any interruption
    python benchmarks/vietnamese.py --hours 0 --write   # only the table, into benchmarks/results/vietnamese

Several processes may share the work: give each other --tasks or --methods, and one --out. What the committed table has
is not trained again: the table grows by a run at a time, on any machine (--ignore-committed begins a new one).

The experiment of the slides that this project began with: PhoBERT-base, 96 % with full fine-tuning and 90 % with LoRA
of rank 8 on query and value. PhoBERT's weights are in no package, so multilingual-e5-small takes its place (--model
names another one). The vocabulary is cut to the tokens of the data, which changes no result: rows that no text uses
have no gradient.

1. Every method's learning rate is chosen on the validation texts: one epoch, seed 0, three rates around the default,
   and further ones while the best is at an end. The score is the mean of accuracy and macro-F1.
2. With that rate, every method is trained for 1 and for 3 epochs from three seeds, and tested.
3. Variants of the main methods show what a gap is due to: targets, head, class weights, the default rate.
4. The same on the demo's movie reviews, for two epochs, to see whether a rate or a default suits both.
5. Candidates for the defaults of LoRA, on both: the moving average, the pooler trained in full.

The main methods come first, so that an early end still leaves a table. Texts are in no result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness.seed_rows import add_differences, key, measured_here, merged, row_of
from harness.vietnamese_methods import (
    CANDIDATES,
    MAIN,
    METHODS,
    SEEDS,
    VARIANTS,
    best_rate,
    default_rate,
    place_in_table,
    validation_score,
)
from harness.vietnamese_table import markdown

from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.costs import measure_costs
from lora_ext.tasks.comparison.many_runs import Run, finished, run_all
from lora_ext.tasks.comparison.processes import in_process
from lora_ext.tasks.finetune.data import fingerprint
from lora_ext.tasks.finetune.settings import PRECISIONS, Settings
from lora_ext.tasks.finetune.task_data import load_data
from lora_ext.tasks.finetune.task_model import load_task_model
from lora_ext.tasks.finetune.vocabulary import save_trimmed, trim_task_model
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.markdown import table
from lora_ext.tasks.shared.whole_files import write_json, write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vietnamese"


class OutOfTime(Exception):
    """The hours are over."""


@dataclass
class Task:
    """A data set with a model.

    Attributes:
        options: fields of Settings for all runs.
        epochs: of the table.
        methods: names in :data:`METHODS` that are trained on it.
        of: what the rows of one table have in common besides the texts: the model's name and the precision.
        kept: rows and tuning of the committed table, if it is of the same texts, model and precision.
    """

    name: str
    options: dict[str, Any]
    epochs: tuple[float, ...]
    methods: tuple[str, ...]
    out: Path
    sha256: str = ""
    texts: dict[str, int] = field(default_factory=dict)
    of: dict[str, str] = field(default_factory=dict)
    kept: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"rows": [], "tuning": []})

    def prepare(self) -> None:
        splits = load_data(Settings(**self.options), lambda line: None)
        self.sha256 = fingerprint(splits)
        self.texts = {side: len(split) for side, split in splits._asdict().items()}

    def keep(self, committed: Mapping[str, Any]) -> None:
        """Takes over what a committed table has of this task."""
        for one in committed["tasks"]:
            if one["name"] == self.name and one["of"] == self.of | {"data_sha256": self.sha256}:
                self.kept = {part: one[part] for part in ("rows", "tuning")}

    def kept_row(self, name: str, rate: float, epochs: float) -> dict[str, Any] | None:
        return next((row for row in self.kept["rows"] if key(row) == (name, rate, epochs)), None)

    def kept_tuning(self, name: str) -> dict[str, Any]:
        found = (one for one in self.kept["tuning"] if one["method"] == name)
        return next(found, {"method": name, "validation_scores": {}, "train_seconds": 0.0})

    def run(self, name: str, rate: float, epochs: float, seed: int, changes: Mapping[str, Any]) -> Run:
        label = f"{name}-{rate:.1e}-{epochs:g}"
        settings = {**self.options, **changes, "learning_rate": rate, "epochs": float(epochs), "seed": seed}
        return Run(label, Settings(**settings), self.sha256)


# --- runs -------------------------------------------------------------------------------------------------------------


class Bench:
    """Carries runs out until the time is over; finished ones are read from their directories."""

    def __init__(self, hours: float) -> None:
        self.until = time.monotonic() + 3600 * hours

    def metrics(self, task: Task, run: Run) -> dict[str, Any]:
        """Returns the metrics of a run. OutOfTime: it is not finished, and no time is left to begin it."""
        if (known := finished(run, task.out)) is not None:
            return known
        if time.monotonic() >= self.until:
            raise OutOfTime
        return run_all([run], task.out, f"{task.name}: {run.label}, seed {run.settings.seed}")[run]

    def tuned_rate(self, task: Task, name: str) -> float:
        """Returns the learning rate that is best on the validation texts."""
        kept = {float(rate): score for rate, score in task.kept_tuning(name)["validation_scores"].items()}

        def score(rate: float) -> float:
            if rate in kept:
                return kept[rate]
            return validation_score(self.metrics(task, task.run(name, rate, 1, 0, METHODS[name])))

        return best_rate(name, score)


def cells(bench: Bench, task: Task) -> Iterator[tuple[str, float, float, list[Run]]]:
    """Yields ``(name, rate, epochs, runs)`` of the task's table, the main methods first; tunes rates on the way."""
    rates: dict[str, float] = {}

    def cell(name: str, rate: float, epochs: float, changes: Mapping[str, Any]) -> tuple[str, float, float, list[Run]]:
        return name, rate, epochs, [task.run(name, rate, epochs, seed, changes) for seed in SEEDS]

    def candidates(epochs: float) -> Iterator[tuple[str, float, float, list[Run]]]:
        for name, (base, changes) in CANDIDATES.items():
            if base in rates and (task.name == "reviews" or "modules_to_save" not in changes):  # E5 has no pooler
                rate = changes.get("learning_rate", rates[base])
                yield cell(name, rate, epochs, METHODS[base] | changes)

    main = [name for name in task.methods if name in MAIN]
    for names in (main, [name for name in task.methods if name not in MAIN]):
        for name in names:
            rates[name] = bench.tuned_rate(task, name)
        for epochs in task.epochs:
            for name in names:
                yield cell(name, rates[name], epochs, METHODS[name])
            if names is main:
                yield from candidates(epochs)
    if task.name == "vsfc":
        for name, (base, changes) in VARIANTS.items():
            if base not in rates:
                continue
            yield cell(name, rates[base], task.epochs[-1], METHODS[base] | changes)
    for name in main:
        if rates[name] != default_rate(name):
            yield cell(f"{name}-default-rate", default_rate(name), task.epochs[-1], METHODS[name])


def carry_out(tasks: list[Task], hours: float) -> bool:
    """Trains what is not finished. Returns whether all is."""
    bench = Bench(hours)
    try:
        for task in tasks:
            for name, rate, epochs, runs in cells(bench, task):
                kept = task.kept_row(name, rate, epochs) or {"seeds": ()}
                for run in runs:
                    if run.settings.seed not in kept["seeds"]:
                        bench.metrics(task, run)
    except OutOfTime:
        return False
    return True


# --- results ----------------------------------------------------------------------------------------------------------


def results_of(task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the table and of the tuning for what is committed or finished."""
    bench, here = Bench(0.0), measured_here()
    rows = {key(row): row for row in task.kept["rows"]}
    tuning: dict[str, dict[str, Any]] = {one["method"]: one for one in task.kept["tuning"]}
    for name in task.methods:
        before = task.kept_tuning(name)
        scores, seconds = dict(before["validation_scores"]), before["train_seconds"]
        for path in sorted((task.out / "runs").glob(f"{name}-*-1/seed-0/metrics.json")):
            rate = json.loads(path.read_text(encoding="utf-8"))["settings"]["learning_rate"]
            known = finished(task.run(name, rate, 1, 0, METHODS[name]), task.out)
            if known is not None and f"{rate:.1e}" not in scores:
                scores[f"{rate:.1e}"] = validation_score(known)
                seconds += known["train_seconds"]
        if scores:
            scores = dict(sorted(scores.items(), key=lambda item: float(item[0])))
            tuning[name] = {"method": name, "validation_scores": scores, "train_seconds": seconds}
    for method in task.methods:  # one by one: another process may not have tuned its methods yet
        try:
            for name, rate, epochs, runs in cells(bench, replace(task, methods=(method,))):
                known = {run: one for run in runs if (one := finished(run, task.out)) is not None}
                if known:
                    found = {run.directory(task.out): one for run, one in known.items()}
                    row = row_of(name, rate, epochs, found, here)
                    rows[key(row)] = merged(rows.get(key(row)), row)
        except OutOfTime:
            continue
    add_differences([*rows.values()], task.texts["test"])
    order = [*METHODS].index
    return sorted(rows.values(), key=place_in_table), sorted(tuning.values(), key=lambda one: order(one["method"]))


# --- an estimate ------------------------------------------------------------------------------------------------------


def estimate(tasks: list[Task], out: Path) -> dict[str, Any]:
    """Measures a step of every method, in interleaved rounds, and multiplies: three rates and all cells.

    An evaluated text is taken for a third of a trained one. Extended grids are not counted.
    """
    result: dict[str, Any] = {"machine": provenance.machine(), "tasks": {}}
    for task in tasks:
        settings = {name: task.run(name, default_rate(name), 1, 0, METHODS[name]).settings for name in task.methods}
        costs = in_process(measure_costs, settings, log=out / f"estimate-{task.name}.log")
        batch = next(iter(settings.values())).batch_size
        steps = {name: costs[name]["step_ms"]["median"] / 1e3 for name in settings}
        hours = 0.0
        for name, seconds in steps.items():
            epochs = [1.0, 1.0, 1.0, *(e for e in task.epochs for _ in SEEDS)]
            variants = [one for one, (base, _) in VARIANTS.items() if base == name and task.name == "vsfc"]
            candidates = [one for one, (base, _) in CANDIDATES.items() if base == name]
            epochs += [task.epochs[-1]] * len(SEEDS) * (len(variants) + (name in MAIN))
            epochs += [*task.epochs] * len(SEEDS) * len(candidates)
            texts = sum(
                e * (task.texts["train"] + task.texts["validation"] / 3) + task.texts["test"] / 3 for e in epochs
            )
            hours += texts / batch * seconds / 3600
        result["tasks"][task.name] = {"step_seconds": steps, "hours": hours}
    result["hours"] = sum(one["hours"] for one in result["tasks"].values())
    write_json(out / "estimate.json", result)
    return result


# --- inputs -----------------------------------------------------------------------------------------------------------


def make_tasks(
    out: Path, model: Path, data: Path, names: list[str], precision: str = "float32", methods: Sequence[str] = ()
) -> list[Task]:
    """Lays out data and model, and returns the tasks with all or some methods.

    Raises:
        TaskError: data or model is missing or damaged.
    """
    tasks, methods = [], tuple(name for name in METHODS if name in (methods or METHODS))
    if "vsfc" in names:
        if model == ROOT / "build" / "e5-small" and not model.is_dir():
            _script("convert_e5.py", model)
        _script("lay_out_vsfc.py", data, out / "data")
        options = {"data": "train", "validation_file": "dev", "test_file": "test"}
        options = {name: str(out / "data" / f"{file}.csv") for name, file in options.items()}
        options |= {"model": str(model)}
        options |= {"model": _trimmed(options, out / "base")} | (
            {"pooling": "mean"} if model.name == "e5-small" else {}
        )
        tasks.append(Task("vsfc", options, (1, 3), methods, out / "vsfc"))
    if "reviews" in names:
        tasks.append(Task("reviews", {}, (2,), methods, out / "reviews"))
    for task in tasks:
        task.options["precision"] = precision
        task.of = {"model": model.name if task.name == "vsfc" else "all-MiniLM-L6-v2", "precision": precision}
        task.prepare()
    return tasks


def _script(name: str, *arguments: Path) -> None:
    if subprocess.run([sys.executable, ROOT / "scripts" / name, *arguments], cwd=ROOT).returncode:
        raise TaskError(f"scripts/{name} failed")


def _trimmed(options: Mapping[str, Any], out: Path) -> str:
    """Returns the path of a checkpoint with the vocabulary of the data, or of the model's if it cannot be cut."""
    if (out / "config.json").is_file():
        return str(out)
    task_model, splits = load_task_model(Settings(**options))
    try:
        trimmed, without = trim_task_model(task_model, splits)
    except TaskError as error:
        print(f"{error}; the whole vocabulary stays")
        return options["model"]
    print(trimmed.line())
    save_trimmed(out, task_model.model, trimmed.tokenizer, without)
    return str(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--hours", type=float, default=0.0, help="no run begins later; 0: only the table of what is finished")
    add("--estimate", action="store_true", help="measure a step of every method, and say how long all would take")
    add("--tasks", nargs="+", choices=["vsfc", "reviews"], default=["vsfc", "reviews"])
    add("--methods", nargs="+", choices=list(METHODS), default=[], metavar="NAME", help="some methods; default: all")
    add(
        "--model",
        type=Path,
        default=ROOT / "build" / "e5-small",
        metavar="DIR",
        help="e5-small, or PhoBERT's directory",
    )
    add("--data", type=Path, default=ROOT.parent / "shared" / "data" / "uit-vsfc", metavar="DIR", help="UIT-VSFC")
    add("--out", type=Path, default=ROOT / "out" / "vietnamese-table", metavar="DIR", help="every run; git ignores it")
    add("--precision", choices=PRECISIONS, default="float32", help="of products; bfloat16 is faster with AMX")
    add("--threads", type=int, metavar="N", help="threads for PyTorch; default: the number of cores")
    add("--write", action="store_true", help=f"write table.json and table.md to {RESULTS.relative_to(ROOT)}")
    add("--ignore-committed", action="store_true", help="begin a new table instead of continuing the one that is there")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        tasks = make_tasks(args.out, args.model.resolve(), args.data, args.tasks, args.precision, args.methods)
        if args.estimate:
            _say_estimate(estimate(tasks, args.out))
            return
        committed: dict[str, Any] = {"tasks": []}
        if not args.ignore_committed:
            committed = json.loads((RESULTS / "table.json").read_text(encoding="utf-8"))
        for task in tasks:
            task.keep(committed)
        complete = carry_out(tasks, args.hours)
    except TaskError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    result = {
        "command": ["python", "benchmarks/vietnamese.py", "--precision", args.precision],
        "complete": complete and len(tasks) == 2 and not args.methods,
        "tasks": [
            {"name": t.name, "of": t.of | {"data_sha256": t.sha256}, "texts": t.texts, "rows": rows, "tuning": tuning}
            for t, (rows, tuning) in ((task, results_of(task)) for task in tasks)
        ],
    }
    names = {task.name for task in tasks}
    result["tasks"] += [one for one in committed["tasks"] if one["name"] not in names]
    result["tasks"].sort(key=lambda one: ["vsfc", "reviews"].index(one["name"]))
    where = RESULTS if args.write else args.out
    where.mkdir(parents=True, exist_ok=True)
    write_json(where / "table.json", result)
    write_whole(where / "table.md", text := markdown(result))
    print(f"{text}\nin {where}: table.json, table.md")
    if not complete:
        print("not complete: the same command with --hours continues")


def _say_estimate(result: Mapping[str, Any]) -> None:
    for name, task in result["tasks"].items():
        fastest = min(task["step_seconds"].values())
        rows = [
            [method, f"{seconds:.2f}", f"{seconds / fastest:.2f}"] for method, seconds in task["step_seconds"].items()
        ]
        print(f"{name}: {task['hours']:.1f} hours\n\n{table(['method', 'seconds a step', 'of the fastest'], rows)}\n")
    median = statistics.median(
        seconds for task in result["tasks"].values() for seconds in task["step_seconds"].values()
    )
    print(
        f"in all {result['hours']:.1f} hours at these speeds (median step {median:.2f} s); a busy machine takes longer"
    )


if __name__ == "__main__":
    main()
