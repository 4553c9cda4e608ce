"""``lora-ext sweep``: LoRA at several ranks and on several sets of weights (the paper's tables 5 and 6)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from lora_ext import LoraConfig
from lora_ext.tasks import TaskError
from lora_ext.tasks.comparison.launch import Launch, check_no_jobs
from lora_ext.tasks.comparison.many_runs import Run, run_all
from lora_ext.tasks.comparison.method_spec import MethodSpec
from lora_ext.tasks.comparison.spread import UNKNOWN_SPREAD, deviation_over, over_seeds, percent, summary, winner
from lora_ext.tasks.comparison.trimmed_base import OUTPUTS, TrimmedBase, of_base, trimmed_base
from lora_ext.tasks.finetune.data import fingerprint
from lora_ext.tasks.finetune.settings import INPUTS, SWEEP_FILE, command_line
from lora_ext.tasks.finetune.task_model import check_checkpointing, check_fits, load_task_model, method_for
from lora_ext.tasks.finetune.training_arguments import check_training_arguments
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.markdown import table
from lora_ext.tasks.shared.run_directory import alone_in_out, check_out, leave_results, prepare_out
from lora_ext.tasks.shared.whole_files import write_json, write_picture

_LORA = MethodSpec.parse("lora")
_OUTPUTS = ("sweep.json", "sweep.md", "sweep.png", "runs", "jobs", *OUTPUTS, SWEEP_FILE)


@alone_in_out
def sweep(
    ranks: Sequence[int],
    targets: Sequence[str],
    seeds: Sequence[int],
    options: Mapping[str, Any],
    out: Path,
    *,
    budget: int | None = None,
    launch: Launch | None = None,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Fine-tunes with LoRA at every rank on every set of weights, and compares the sets at one number of parameters.

    ``lora_alpha`` stays the same at all ranks, as in the paper.

    Args:
        ranks: ranks of the first table, in any order.
        targets: sets of weights, each in the syntax of finetune's ``--target-modules``.
        seeds: every cell is trained with every seed.
        options: fields of :class:`~lora_ext.tasks.finetune.settings.Settings` for all runs.
        out: directory for sweep.json, .md and .png.
        budget: number of parameters in the second table, where each set gets the highest rank within the budget. None
            selects the parameters of the first set at rank 8, or of the widest set at rank 1 if that is more.
        launch: where the runs go; None for one after the other on this machine.

    Returns:
        The content of sweep.json.

    Raises:
        TaskError: the arguments are wrong (raised before any run), or a run failed.
        KeyboardInterrupt: Ctrl-C; ``resume`` continues.
    """
    inputs = [options.get(name) for name in INPUTS]
    check_out(out, resume, overwrite, marker=SWEEP_FILE, what="a sweep", outputs=_OUTPUTS, inputs=inputs)
    if overwrite:
        check_no_jobs(out)
    options = {**options, "method": "lora"}
    ranks, targets, seeds = sorted(set(ranks)), list(dict.fromkeys(targets)), list(dict.fromkeys(seeds))
    for rank in ranks:
        try:
            LoraConfig(r=rank, target_modules="all-linear")
        except (TypeError, ValueError) as error:
            raise TaskError(f"--ranks: {error}") from error
    launch = launch or Launch()
    launch.check(out)
    per_rank, texts, base = _parameters_per_rank(targets, options)
    widest = max(targets, key=lambda target: per_rank[target])
    budget = max(8 * per_rank[targets[0]], per_rank[widest]) if budget is None else budget
    if budget < per_rank[widest]:
        raise TaskError(
            f"--budget is {budget}, but {widest} has {per_rank[widest]} parameters at rank 1; want at least that"
        )
    within = {target: budget // per_rank[target] for target in targets}
    request = {"ranks": ranks, "targets": targets, "seeds": seeds, "budget": budget, "options": options}
    request["threads"] = torch.get_num_threads()

    cells = [(rank, target) for target in targets for rank in ranks]
    cells += [cell for target in targets if (cell := (within[target], target)) not in cells]

    def run_of(rank: int, target: str, seed: int) -> Run:
        cell_options = {**options, "r": rank, "target_modules": target}
        return Run(f"r={rank} {target}", of_base(_LORA.settings(cell_options, seed), out), texts)

    runs = {(rank, target): [run_of(rank, target, seed) for seed in seeds] for rank, target in cells}
    prepare_out(out, _OUTPUTS, resume, lambda out: write_json(out / SWEEP_FILE, request))
    if base is not None:
        base.save(out, _LORA.settings(options, seed=0), texts, say)
    metrics = run_all([run for cell_runs in runs.values() for run in cell_runs], out, "sweep", launch)

    results = {
        cell: {
            "r": cell[0],
            "target_modules": cell[1],
            "parameters": cell[0] * per_rank[cell[1]],
            "accuracy": summary([metrics[run]["after"]["accuracy"] for run in cell_runs]),
            "macro_f1": summary([metrics[run]["after"]["macro_f1"] for run in cell_runs]),
        }
        for cell, cell_runs in runs.items()
    }
    result = {
        **provenance.made_by(_command(request, out, launch)),
        "machine": provenance.machine(),
        **request,
        "cells": list(results.values()),
        "best_rank": {
            target: winner({rank: results[rank, target]["accuracy"] for rank in ranks}) for target in targets
        },
        "within_budget": [results[within[target], target] for target in targets],
        "best_within_budget": winner({target: results[within[target], target]["accuracy"] for target in targets}),
        "examples": next(iter(metrics.values()))["examples"],
    }
    _plot(out / "sweep.png", result)
    leave_results(out, "sweep", result, markdown(result), say)
    return result


def _parameters_per_rank(
    targets: Sequence[str], options: Mapping[str, Any]
) -> tuple[dict[str, int], str, TrimmedBase | None]:
    """Returns the parameters of each set of weights at rank 1, and the fingerprint of the texts.

    The third result is the checkpoint with a trimmed vocabulary, if one is wanted. This finds every mistake in the sets
    and in the data before the first run.
    """
    first = _LORA.settings(options, seed=0)
    task_model, splits = load_task_model(first)
    check_fits(task_model, first)
    check_checkpointing(task_model.model, first)
    check_training_arguments(first, len(splits.train))
    counts = {}
    for target in targets:
        rank_1 = _LORA.settings({**options, "r": 1, "target_modules": target}, seed=0)
        try:
            counts[target] = method_for(task_model.model, rank_1, task_model.path).count(task_model.model)
        except (TypeError, ValueError) as error:
            raise TaskError(f"--targets {target}: {error}") from error
    return counts, fingerprint(splits), trimmed_base(task_model, splits) if first.trim_vocabulary else None


def _command(request: Mapping[str, Any], out: Path, launch: Launch) -> list[str]:
    """Returns the command that repeats the whole sweep, including ranks and sets added by ``--resume``."""
    lists = {"--ranks": ",", "--targets": ";", "--seeds": ","}
    first = [part for name, by in lists.items() for part in (name, by.join(map(str, request[name.removeprefix("--")])))]
    first += ["--budget", str(request["budget"])]
    options = {name: value for name, value in request["options"].items() if name != "method"}
    return command_line("sweep", options, out, *first, *launch.arguments())


def markdown(result: Mapping[str, Any]) -> str:
    """Returns sweep.md: both tables, and the machine and versions they were measured with."""
    cells = {(cell["r"], cell["target_modules"]): cell for cell in result["cells"]}
    by_rank = []
    for target in result["targets"]:
        row = [f"`{target}`", f"{cells[result['ranks'][0], target]['parameters'] // result['ranks'][0]:,}"]
        for rank in result["ranks"]:
            text = percent(cells[rank, target]["accuracy"])
            row.append(f"**{text}**" if result["best_rank"][target] == rank else text)
        by_rank.append(row)
    by_weights = []
    for cell in result["within_budget"]:
        text = percent(cell["accuracy"])
        text = f"**{text}**" if cell["target_modules"] == result["best_within_budget"] else text
        by_weights.append([f"`{cell['target_modules']}`", str(cell["r"]), f"{cell['parameters']:,}", text])
    marked = """Bold: ahead of every other value in the row (in the second table: in the column) by more than the
spread, the square root of the sum of both variances. Where nothing is bold, the seeds differ by as much as the
settings."""
    if len(result["seeds"]) == 1:
        marked = f"{UNKNOWN_SPREAD.capitalize()}."
    return f"""# LoRA by rank and by weights

{deviation_over(result["seeds"])}: test accuracy in percent, on {result["examples"]["test"]:,} texts.

{marked}

## Ranks

{table(["weights", "parameters a rank", *(f"r = {rank}" for rank in result["ranks"])], by_rank)}

## Which weights, at {result["budget"]:,} parameters

{table(["weights", "r", "parameters", "accuracy, %"], by_weights)}

{provenance.measured_on(result)}
"""


def _plot(path: Path, result: Mapping[str, Any]) -> None:
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    cells = {(cell["r"], cell["target_modules"]): cell["accuracy"] for cell in result["cells"]}
    for target in result["targets"]:
        accuracies = [cells[rank, target] for rank in result["ranks"]]
        axes.errorbar(
            result["ranks"],
            [100 * accuracy["mean"] for accuracy in accuracies],
            [100 * (accuracy["sd"] or 0.0) for accuracy in accuracies],
            marker="o",
            capsize=3,
            label=target,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(result["ranks"], [str(rank) for rank in sorted(result["ranks"])])
    axes.set(xlabel="rank", ylabel="test accuracy, %")
    axes.set_title(over_seeds(result["seeds"]))
    axes.grid(alpha=0.3)
    axes.legend(title="weights")
    write_picture(path, figure)
