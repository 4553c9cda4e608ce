"""How much does LoRA lose to full fine-tuning on UIT-VSFC, sentiments of student feedback in Vietnamese, and why?

    python benchmarks/vietnamese.py --estimate          # seconds a step of every method, and hours of the whole table
    python benchmarks/vietnamese.py --hours 10          # trains; the same command continues after any interruption
    python benchmarks/vietnamese.py --hours 0 --write   # only the table, into benchmarks/results/vietnamese

Several processes may share the work: give each other --tasks or --methods, and one --out.

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
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from harness.paired import correct_answers, paired_difference

from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.costs import measure_costs
from lora_ext.tasks.comparison.many_runs import Run, finished, run_all
from lora_ext.tasks.comparison.processes import in_process
from lora_ext.tasks.comparison.spread import percent, summary
from lora_ext.tasks.finetune.data import fingerprint
from lora_ext.tasks.finetune.settings import LEARNING_RATES, PRECISIONS, Settings
from lora_ext.tasks.finetune.task_data import load_data
from lora_ext.tasks.finetune.task_model import load_task_model
from lora_ext.tasks.finetune.vocabulary import save_trimmed, trim_task_model
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.markdown import table
from lora_ext.tasks.shared.whole_files import write_json, write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "vietnamese"
SEEDS = (0, 1, 2)
_STEP = math.sqrt(10)  # between two learning rates
_MOST_RATES = 6

_QV = {"method": "lora", "target_modules": "q,v"}
MAIN = {"full": {"method": "full"}, "lora-qv": _QV, "lora-all": {"method": "lora"}}
OTHERS = ("bitfit", "adapter-h", "adapter-l", "adapter-p", "adapter-drop", "prefix-embed", "prefix-layer", "head-only")
METHODS: dict[str, dict[str, Any]] = MAIN | {name: {"method": name} for name in OTHERS}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {  # name: the method whose rate it takes, and what differs
    "lora-qkvo": ("lora-qv", {"target_modules": "q,k,v,o"}),
    "lora-qv-pooler": ("lora-qv", {"pooling": "cls"}),
    "lora-qv-balanced": ("lora-qv", {"class_weights": "balanced"}),
    "lora-all-pooler": ("lora-all", {"pooling": "cls"}),
    "lora-all-balanced": ("lora-all", {"class_weights": "balanced"}),
    "full-pooler": ("full", {"pooling": "cls"}),
    "full-balanced": ("full", {"class_weights": "balanced"}),
}
_AVERAGED = {"schedule": "constant", "ema_decay": 0.995}
_POOLER = {"r": 6, "modules_to_save": "pooler"}  # as many parameters as rank 8 without a pooler, and 0.3 % more
_EMBEDDINGS = {  # what docs/results.md found on the reviews
    "target_modules": "query,key,value,dense,word_embeddings",
    "r": 4,
    "lora_alpha": 0.8,
    "learning_rate": 2e-4,
    "lora_plus_ratio": 60.0,
}
_EMBEDDINGS_AND_POOLER = _EMBEDDINGS | {"modules_to_save": "pooler"}
CANDIDATES: dict[str, tuple[str, dict[str, Any]]] = {  # for the defaults of LoRA; as VARIANTS, on both tasks
    "lora-embeddings-trained-pooler": ("lora-all", _EMBEDDINGS_AND_POOLER),
    "lora-embeddings": ("lora-all", _EMBEDDINGS),
    "lora-embeddings-trained-pooler-averaged": ("lora-all", _EMBEDDINGS_AND_POOLER | _AVERAGED),
    "lora-embeddings-averaged": ("lora-all", _EMBEDDINGS | _AVERAGED),
    "full-averaged": ("full", _AVERAGED),
    "lora-all-averaged": ("lora-all", _AVERAGED),
    "lora-all-trained-pooler": ("lora-all", _POOLER),
    "lora-all-trained-pooler-averaged": ("lora-all", _POOLER | _AVERAGED),
}
SLIDES = (("full (slides)", "135,000,000", "96"), ("lora-qv (slides)", "887,811", "90"))


class OutOfTime(Exception):
    """The hours are over."""


@dataclass
class Task:
    """A data set with a model.

    Attributes:
        options: fields of Settings for all runs.
        epochs: of the table.
        methods: names in :data:`METHODS` that are trained on it.
    """

    name: str
    options: dict[str, Any]
    epochs: tuple[float, ...]
    methods: tuple[str, ...]
    out: Path
    sha256: str = ""
    texts: dict[str, int] = field(default_factory=dict)

    def prepare(self) -> None:
        splits = load_data(Settings(**self.options), lambda line: None)
        self.sha256 = fingerprint(splits)
        self.texts = {side: len(split) for side, split in splits._asdict().items()}

    def run(self, name: str, rate: float, epochs: float, seed: int, changes: Mapping[str, Any]) -> Run:
        label = f"{name}-{rate:.1e}-{epochs:g}"
        settings = {**self.options, **changes, "learning_rate": rate, "epochs": float(epochs), "seed": seed}
        return Run(label, Settings(**settings), self.sha256)


def default_rate(name: str) -> float:
    return LEARNING_RATES.get(METHODS[name]["method"], 1e-3)


def rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


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
        scores = self.scores(task, name)
        while len(scores) < _MOST_RATES:
            best = max(scores, key=scores.get)
            if min(scores) < best < max(scores):
                break
            further = rounded(best / _STEP if best == min(scores) else best * _STEP)
            scores[further] = validation_score(self.metrics(task, task.run(name, further, 1, 0, METHODS[name])))
        return max(scores, key=scores.get)

    def scores(self, task: Task, name: str) -> dict[float, float]:
        middle = default_rate(name)
        rates = [rounded(middle / _STEP), middle, rounded(middle * _STEP)]
        return {rate: validation_score(self.metrics(task, task.run(name, rate, 1, 0, METHODS[name]))) for rate in rates}


def validation_score(metrics: Mapping[str, Any]) -> float:
    return (metrics["validation"]["accuracy"] + metrics["validation"]["macro_f1"]) / 2


def cells(bench: Bench, task: Task) -> Iterator[tuple[str, float, float, list[Run]]]:
    """Yields ``(name, rate, epochs, runs)`` of the task's table, the main methods first; tunes rates on the way."""
    rates: dict[str, float] = {}

    def cell(name: str, rate: float, epochs: float, changes: Mapping[str, Any]) -> tuple[str, float, float, list[Run]]:
        return name, rate, epochs, [task.run(name, rate, epochs, seed, changes) for seed in SEEDS]

    def candidates() -> Iterator[tuple[str, float, float, list[Run]]]:
        for name, (base, changes) in CANDIDATES.items():
            if base in rates and (task.name == "reviews" or "modules_to_save" not in changes):  # E5 has no pooler
                rate = changes.get("learning_rate", rates[base])
                yield cell(name, rate, task.epochs[0], METHODS[base] | changes)

    main = [name for name in task.methods if name in MAIN]
    for names in (main, [name for name in task.methods if name not in MAIN]):
        for name in names:
            rates[name] = bench.tuned_rate(task, name)
        for epochs in task.epochs:
            for name in names:
                yield cell(name, rates[name], epochs, METHODS[name])
            if names is main and epochs == task.epochs[0]:
                yield from candidates()
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
            for _, _, _, runs in cells(bench, task):
                for run in runs:
                    bench.metrics(task, run)
    except OutOfTime:
        return False
    return True


# --- results ----------------------------------------------------------------------------------------------------------


def results_of(task: Task) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the table and of the tuning for what is finished."""
    bench = Bench(0.0)
    tuning: list[dict[str, Any]] = []
    found_rows: list[tuple[dict[str, Any], list[Path]]] = []  # with the directories of the runs
    for name in task.methods:
        found = {}
        for path in sorted((task.out / "runs").glob(f"{name}-*-1/seed-0/metrics.json")):
            rate = json.loads(path.read_text(encoding="utf-8"))["settings"]["learning_rate"]
            if (known := finished(task.run(name, rate, 1, 0, METHODS[name]), task.out)) is not None:
                found[rate] = known
        if found:
            scores = {f"{rate:.1e}": validation_score(found[rate]) for rate in sorted(found)}
            seconds = sum(metrics["train_seconds"] for metrics in found.values())
            tuning.append({"method": name, "validation_scores": scores, "train_seconds": seconds})
    for method in task.methods:  # one by one: another process may not have tuned its methods yet
        try:
            for name, rate, epochs, runs in cells(bench, replace(task, methods=(method,))):
                known = {run: one for run in runs if (one := finished(run, task.out)) is not None}
                if known:
                    row = _row(name, rate, epochs, [*known.values()])
                    found_rows.append((row, [run.directory(task.out) for run in known]))
        except OutOfTime:
            continue
    full = {row["epochs"]: correct_answers(runs) for row, runs in found_rows if row["name"] == "full"}
    for row, runs in found_rows:
        if row["name"] != "full" and row["epochs"] in full:
            row["accuracy_minus_full"] = paired_difference(correct_answers(runs), full[row["epochs"]])
    groups = [list(MAIN), list(METHODS), list(CANDIDATES), list(VARIANTS)]

    def place(row: Mapping[str, Any]) -> tuple[int, float, int]:
        group = next((number for number, names in enumerate(groups) if row["name"] in names), len(groups))
        names = [*METHODS, *CANDIDATES, *VARIANTS, row["name"]]
        return group, row["epochs"], names.index(row["name"])

    return sorted((row for row, _ in found_rows), key=place), tuning


def _row(name: str, rate: float, epochs: float, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    first = metrics[0]
    classes = [one["label"] for one in first["after"]["classes"]]
    f1 = {label: summary([run["after"]["classes"][i]["f1"] for run in metrics]) for i, label in enumerate(classes)}
    return {
        "name": name,
        "learning_rate": rate,
        "epochs": epochs,
        "seeds": [run["settings"]["seed"] for run in metrics],
        "trained_parameters": first["trainable_parameters"],
        "head_parameters": first["head_parameters"],
        "total_parameters": first["total_parameters"],
        **{key: summary([run["after"][key] for run in metrics]) for key in ("accuracy", "macro_f1", "weighted_f1")},
        "f1": f1,
        "train_seconds": summary([run["train_seconds"] for run in metrics]),
        "peak_memory_bytes": summary([run["peak_memory_bytes"] for run in metrics]),
    }


def markdown(result: Mapping[str, Any]) -> str:
    parts = ["# UIT-VSFC and the demo's reviews: full fine-tuning, LoRA and the other methods\n"]
    for task in result["tasks"]:
        labels = list(task["rows"][0]["f1"]) if task["rows"] else []
        heading = ["method", "epochs", "seeds", "rate", "trained", "accuracy, %", "minus full, points"]
        heading += ["macro-F1, %", "weighted F1, %"]
        heading += [f"F1 {label}, %" for label in labels] + ["training, s", "peak memory, MiB"]
        rows = []
        if task["name"] == "vsfc":
            rows += [
                [name, "", "", "", trained, accuracy] + [""] * (len(heading) - 6) for name, trained, accuracy in SLIDES
            ]
        for row in task["rows"]:
            shares = [percent(row["accuracy"]), _points(row.get("accuracy_minus_full"))]
            shares += [percent(row[key]) for key in ("macro_f1", "weighted_f1")]
            shares += [percent(row["f1"][label]) for label in labels]
            costs = [f"{row['train_seconds']['mean']:.0f}", f"{row['peak_memory_bytes']['mean'] / 2**20:,.0f}"]
            sizes = [f"{row['epochs']:g}", str(len(row["seeds"])), f"{row['learning_rate']:.1e}"]
            rows.append([row["name"], *sizes, f"{row['trained_parameters']:,}", *shares, *costs])
        sizes = ", ".join(f"{number:,} for {side}" for side, number in task["texts"].items())
        of_points = (
            "Minus full: accuracy minus full fine-tuning's after as many epochs, with a 95 % interval (bootstrap of\n"
        )
        of_points += "test texts and seeds)."
        parts.append(f"## {task['name']}: {sizes}\n\n{table(heading, rows)}\n\n{of_points}\n")
        tuned = [
            [one["method"], "; ".join(f"{rate}: {100 * score:.1f}" for rate, score in one["validation_scores"].items())]
            + [f"{one['train_seconds']:.0f}"]
            for one in task["tuning"]
        ]
        of_rates = "Learning rates: mean of validation accuracy and macro-F1 in percent, one epoch, seed 0."
        parts.append(f"{of_rates}\n\n{table(['method', 'rate: score', 'training, s'], tuned)}\n")
    if not result["complete"]:
        parts.append("Not complete: runs are missing.\n")
    parts.append(f"`{' '.join(result['command'])}`\n\n{provenance.measured_on(result)}\n")
    return "\n".join(parts)


def _points(difference: Mapping[str, float] | None) -> str:
    if difference is None:
        return ""
    return "{mean:+.1f} ({low:+.1f} to {high:+.1f})".format(**{key: 100 * one for key, one in difference.items()})


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
            epochs += [task.epochs[0]] * len(SEEDS) * len(candidates)
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
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        tasks = make_tasks(args.out, args.model.resolve(), args.data, args.tasks, args.precision, args.methods)
        if args.estimate:
            _say_estimate(estimate(tasks, args.out))
            return
        complete = carry_out(tasks, args.hours)
    except TaskError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")
    found = [(task, *results_of(task)) for task in tasks]
    result = {
        "command": ["python", "benchmarks/vietnamese.py", "--tasks", *args.tasks, "--precision", args.precision]
        + (["--methods", *args.methods] if args.methods else []),
        "date": provenance.made_by()["date"],
        "machine": provenance.machine(),
        "complete": complete,
        "tasks": [{"name": t.name, "texts": t.texts, "rows": rows, "tuning": tuning} for t, rows, tuning in found],
    }
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
