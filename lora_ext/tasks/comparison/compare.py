"""``lora-ext compare``: methods side by side on one model and data, over several seeds (the paper's figure 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from lora_ext._common.progress import progress
from lora_ext.files import read_json_object
from lora_ext.methods import Insertion, prepare_method
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.costs import measure_costs
from lora_ext.tasks.comparison.launch import Launch, check_no_jobs
from lora_ext.tasks.comparison.many_runs import Run, run_all
from lora_ext.tasks.comparison.method_spec import MethodSpec, check_labels, check_options
from lora_ext.tasks.comparison.pools import Pool, pool_of
from lora_ext.tasks.comparison.spread import (
    UNKNOWN_SPREAD,
    deviation_over,
    lines_of,
    named_rows,
    over_seeds,
    percent,
    summary,
    winner,
)
from lora_ext.tasks.comparison.trimmed_base import OUTPUTS, TrimmedBase, of_base, trimmed_base
from lora_ext.tasks.finetune.data import fingerprint
from lora_ext.tasks.finetune.settings import COMPARE_FILE, INPUTS, Settings, command_line
from lora_ext.tasks.finetune.task_data import encode
from lora_ext.tasks.finetune.task_model import (
    TaskModel,
    check_checkpointing,
    check_fits,
    check_room,
    load_task_model,
    method_for,
    most_tokens,
)
from lora_ext.tasks.finetune.training_arguments import check_training_arguments
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.markdown import table
from lora_ext.tasks.shared.run_directory import alone_in_out, check_out, leave_results, prepare_out
from lora_ext.tasks.shared.whole_files import write_json, write_picture

_OUTPUTS = ("compare.json", "compare.md", "compare.png", "costs.json", "costs.log", "runs", "jobs", *OUTPUTS)
_OUTPUTS += (COMPARE_FILE,)  # removed last: it marks the other files as a comparison's


@alone_in_out
def compare(
    methods: Sequence[str],
    seeds: Sequence[int],
    options: Mapping[str, Any],
    out: Path,
    *,
    launch: Launch | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tunes with every method and seed, measures costs, writes compare.json, .md and .png to ``out``.

    Skips methods that do not suit the checkpoint; ``left_out`` in the result gives the reason for each.

    Args:
        methods: texts that :class:`~lora_ext.tasks.comparison.method_spec.MethodSpec` parses.
        seeds: every method is trained with every seed.
        options: fields of :class:`~lora_ext.tasks.finetune.settings.Settings` for all runs; a learning rate of None
            selects the default of each method.
        launch: where the runs and the measurements go; None for one after the other on this machine. Runs at the same
            time on one machine share it while they are timed.

    Returns:
        The content of compare.json.

    Raises:
        TaskError: the arguments are wrong (raised before any run), or a run failed.
        KeyboardInterrupt: Ctrl-C; ``resume`` continues.
    """
    inputs = [options.get(name) for name in INPUTS]
    check_out(out, resume, overwrite, marker=COMPARE_FILE, what="a comparison", outputs=_OUTPUTS, inputs=inputs)
    if overwrite:
        check_no_jobs(out)
    specs = [MethodSpec.parse(text) for text in dict.fromkeys(methods)]
    check_labels([(spec, spec.settings(options, seeds[0])) for spec in specs])
    if not resume:  # which may leave out the method that an option was for
        check_options(specs, options)
    launch = launch or Launch()
    launch.check(out)
    settings = {spec.label: spec.settings(options, seeds[0]) for spec in specs}
    request = {"methods": [spec.text for spec in specs], "seeds": list(dict.fromkeys(seeds)), "options": dict(options)}
    request["threads"] = torch.get_num_threads()
    texts, left_out, base = _check(settings)
    for label, reason in left_out.items():
        say(f"{label} is left out: {reason}")
        del settings[label]
    specs = [spec for spec in specs if spec.label in settings]
    pairs = [(spec, of_base(spec.settings(options, seed), out)) for spec in specs for seed in dict.fromkeys(seeds)]
    runs = [Run(spec.label, run_settings, texts) for spec, run_settings in pairs]
    prepare_out(out, _OUTPUTS, resume, lambda out: write_json(out / COMPARE_FILE, request))
    if base is not None:
        base.save(out, next(iter(settings.values())), texts, say)
        settings = {label: of_base(one, out) for label, one in settings.items()}

    metrics = run_all(runs, out, "compare", launch)
    costs, machine = _costs(settings, texts, out, pool_of(launch, out, 1))
    result = {
        **provenance.made_by(_command(request, out, launch)),
        "machine": machine,
        "machines": _machines(metrics.values()),
        **request,
        "left_out": [{"label": label, "reason": reason} for label, reason in left_out.items()],
        "methods": [_row(spec, [metrics[run] for run in runs if run.label == spec.label], costs) for spec in specs],
        "base_forward_ms": costs["base"]["forward_ms"],
        "examples": metrics[runs[0]]["examples"],
    }
    result["best"] = winner({row["label"]: row["accuracy"] for row in result["methods"]})
    _plot(out / "compare.png", result)
    leave_results(out, "compare", result, markdown(result), say)
    return result


def _check(settings: Mapping[str, Settings]) -> tuple[str, dict[str, str], TrimmedBase | None]:
    """Returns the fingerprint of the texts, and ``{label: reason}`` for methods that cannot suit the checkpoint.

    The third result is the checkpoint with a trimmed vocabulary, if one is wanted.

    Raises:
        TaskError: the texts or the options of a method are wrong, or no method suits the checkpoint.
    """
    first = next(iter(settings.values()))
    task_model, splits = load_task_model(first)
    texts = [example for split in splits for example in split]
    rows: dict[int, list[dict[str, Any]]] = {}
    unsuited: dict[str, str] = {}
    for label, method_settings in settings.items():
        try:
            _insertions(task_model, Settings(method=method_settings.method))
            check_fits(task_model, method_settings)
        except (TaskError, TypeError, ValueError) as error:
            unsuited[label] = str(error)
            continue
        try:
            check_checkpointing(task_model.model, method_settings)
            check_training_arguments(method_settings, len(splits.train))
            insertions = _insertions(task_model, method_settings)
            max_length = method_settings.max_length
            if max_length not in rows:
                rows[max_length] = encode(texts, task_model.tokenizer, splits.labels, max_length).rows
            modules = [insertion.module for insertion in insertions]
            check_room(modules, most_tokens(task_model.model), rows[max_length])
        except (TaskError, TypeError, ValueError) as error:
            raise TaskError(f"--methods {label}: {error}") from error
    if len(unsuited) == len(settings):
        raise TaskError("--methods: none suits the model: " + "; ".join(f"{k}: {v}" for k, v in unsuited.items()))
    base = trimmed_base(task_model, splits) if first.trim_vocabulary else None
    return fingerprint(splits), unsuited, base


def _insertions(task_model: TaskModel, settings: Settings) -> list[Insertion]:
    """Returns what the method would insert into the model; raises TypeError or ValueError if it cannot."""
    return prepare_method(task_model.model, method_for(task_model.model, settings, task_model.path))[0]


def _machines(metrics: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the kinds of machines that the runs were made on."""
    known = [run["machine"] for run in metrics if "machine" in run]
    return sorted({f"{one.get('processor')}, {one.get('gpu') or 'no GPU'}" for one in known})


def _command(request: Mapping[str, Any], out: Path, launch: Launch) -> list[str]:
    """Returns the command that repeats the whole comparison, including methods added by ``--resume``."""
    first = ["--methods", *request["methods"], "--seeds", ",".join(map(str, request["seeds"]))]
    return command_line("compare", request["options"], out, *first, *launch.arguments())


def _costs(
    settings: Mapping[str, Settings], texts: str, out: Path, pool: Pool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measures the costs, or reads costs.json if it is for the same settings, machine and texts.

    Returns:
        The costs, and the machine that they were measured on.
    """
    wanted = {"settings": {label: asdict(one) for label, one in settings.items()}, "machine": provenance.machine()}
    wanted["data_sha256"] = texts
    path = out / "costs.json"
    try:
        if {**(known := read_json_object(path, "", 10_000_000)), **wanted} == known:
            return known["costs"], known.get("measured_on", known["machine"])
    except (OSError, ValueError, KeyError):
        pass  # the file does not exist yet, or is damaged
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
    with progress("compare: a step and a forward of each", 1.0, unit="", bar_format=bar_format) as shown:
        how = {"log": out / "costs.log", "threads": torch.get_num_threads(), "on_progress": shown.set}
        costs, machine = pool.call(_measure_costs, dict(settings), **how)
    write_json(path, {**wanted, "measured_on": machine, "costs": costs})
    return costs, machine


def _measure_costs(
    settings: Mapping[str, Settings], on_progress: Callable[[float], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    return measure_costs(settings, on_progress), provenance.machine()


def _row(spec: MethodSpec, metrics: Sequence[Mapping[str, Any]], costs: Mapping[str, Any]) -> dict[str, Any]:
    first = metrics[0]
    return {
        "label": spec.label,
        "spec": spec.text,
        "method": first["settings"]["method"],
        "settings": first["settings"],
        "trained_parameters": first["trainable_parameters"],
        "head_parameters": first["head_parameters"],
        "total_parameters": first["total_parameters"],
        "accuracy": summary([run["after"]["accuracy"] for run in metrics]),
        "macro_f1": summary([run["after"]["macro_f1"] for run in metrics]),
        **_by_class([run["after"] for run in metrics]),
        "validation_accuracy": summary([run["validation"]["accuracy"] for run in metrics])
        if all(run["validation"] for run in metrics)
        else None,
        "train_seconds": summary([run["train_seconds"] for run in metrics]),
        "runs_at_once": max(run.get("runs_at_once", 1) for run in metrics),
        "peak_memory_bytes": summary([run["peak_memory_bytes"] for run in metrics]),
        "checkpoint_bytes": first.get("adapter_bytes", first["full_checkpoint_bytes"]),
        **costs[spec.label],
    }


def _by_class(scores: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the weighted F1, the lists over seeds of each class's scores, and the confusion matrices' sum.

    Empty if a run of an earlier release lacks them.
    """
    if any("classes" not in one for one in scores):
        return {}
    kinds = ("precision", "recall", "f1")
    return {
        "weighted_f1": summary([one["weighted_f1"] for one in scores]),
        "classes": [
            {
                "label": first["label"],
                "support": first["support"],
                **{kind: [one["classes"][index][kind] for one in scores] for kind in kinds},
            }
            for index, first in enumerate(scores[0]["classes"])
        ],
        "confusion": sum(np.array(one["confusion"]) for one in scores).tolist(),
    }


def _class_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the section of compare.md on classes, or "" if there is none or it would be too wide."""
    if any("classes" not in row for row in rows) or len(rows[0]["classes"]) > 10:
        return ""
    heading = ["method", "weighted F1", *(f"{one['label']} ({one['support']:,})" for one in rows[0]["classes"])]
    shown = [[row["label"], percent(row["weighted_f1"]), *_class_f1(row)] for row in rows]
    return f"\nF1 of each class in percent, with its number of test texts:\n\n{table(heading, shown)}\n"


def _class_f1(row: Mapping[str, Any]) -> list[str]:
    return [percent(summary(one["f1"])) for one in row["classes"]]


def markdown(result: Mapping[str, Any]) -> str:
    """Returns compare.md: the table, and the machine and versions it was measured with."""
    base = result["base_forward_ms"]["median"]
    rows = []
    for row in result["methods"]:
        without_head = row["trained_parameters"] - row["head_parameters"]
        forward = f"{row['forward_ms']['median'] / base:.2f}"
        if "merged_forward_ms" in row:
            forward += f"; merged {row['merged_forward_ms']['median'] / base:.2f}"
        accuracy = percent(row["accuracy"])
        rows.append(
            [
                row["label"],
                f"{without_head:,}",
                f"{row['trained_parameters'] / row['total_parameters']:.2%}",
                f"**{accuracy}**" if row["label"] == result["best"] else accuracy,
                percent(row["macro_f1"]),
                f"{row['step_ms']['median']:.0f} ({row['step_ms']['q1']:.0f}-{row['step_ms']['q3']:.0f})",
                f"{row['train_seconds']['mean']:.0f}{chr(92) + '*' if row['runs_at_once'] > 1 else ''}",
                f"{row['peak_memory_bytes']['mean'] / 2**20:,.0f}",
                f"{row['checkpoint_bytes'] / 1e6:.2f}",
                forward,
            ]
        )
    heading = ["method", "parameters", "trained", "accuracy, %", "macro-F1, %", "step, ms", "training, s"]
    heading += ["peak memory, MiB", "checkpoint, MB", "forward / base"]
    head = result["methods"][0]["head_parameters"]
    at_once = max(row["runs_at_once"] for row in result["methods"])
    shared = left_out = names = ""
    if named := named_rows(result["methods"]):
        names = "\n" + "".join(f"- `{label}`: `{spec}`\n" for label, spec in named.items())
    if at_once > 1:
        shared = f"\\* Seconds of runs that shared the machine, up to {at_once} at once; steps were timed separately.\n"
    if len(machines := result.get("machines", ())) > 1:
        shared += f"The runs were made on several kinds of machines, and their seconds differ: {'; '.join(machines)}.\n"
    if result["left_out"]:
        reasons = "\n".join(f"- `{method['label']}`: {method['reason']}" for method in result["left_out"])
        left_out = f"\nLeft out, because they do not suit the checkpoint:\n\n{reasons}\n"
    marked = "bold: ahead of every other by more" if result["best"] else "no method is ahead of every other by more"
    if len(result["seeds"]) == 1:
        marked = UNKNOWN_SPREAD
    return f"""# Methods compared

{table(heading, rows)}

{deviation_over(result["seeds"])}, on {result["examples"]["test"]:,} test texts; {marked}.
"parameters" excludes the new head ({head:,}), which every method trains; "trained" is the share of all parameters and
includes the head. "step" is one training step on a batch of median length. "forward / base" is a forward pass over the
longest texts, relative to the base model's {base:.1f} ms. Both are medians of interleaved rounds, with quartiles for
the step. Peak memory is measured in the separate process of each run.
{shared}{names}{left_out}{_class_table(result["methods"])}
{provenance.measured_on(result)}
"""


def _plot(path: Path, result: Mapping[str, Any]) -> None:
    """Plots accuracy over trained parameters, the paper's figure 2; a line joins settings that differ only in size."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    lines = lines_of(result["methods"])
    markers = "osD^vP*X<>hdp8H"
    if len(lines) > 10:  # the default cycle has 10 colours
        axes.set_prop_cycle(color=matplotlib.colormaps["tab20"].colors)
    for index, (name, rows) in enumerate(lines.items()):
        axes.errorbar(
            [row["trained_parameters"] for row in rows],
            [100 * row["accuracy"]["mean"] for row in rows],
            [100 * (row["accuracy"]["sd"] or 0.0) for row in rows],
            marker=markers[index % len(markers)],
            capsize=3,
            label=name,
        )
    axes.set(xscale="log", xlabel="trained parameters, head included", ylabel="test accuracy, %")
    axes.set_title(over_seeds(result["seeds"]))
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    write_picture(path, figure)
