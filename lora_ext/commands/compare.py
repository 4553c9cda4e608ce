"""``lora-ext compare SPEC ... --seeds 0,1,2 --out DIR [options of finetune]``: methods, ranks, matrices, seeds.

A spec is ``method:option=value:...``, such as ``full``, ``lora:r=8`` or ``lora:targets=q,v:learning_rate=3e-3``.
Several values of a number are several runs: ``lora:r=1,2,4,8,64``. ``name=TEXT`` is the label in tables. Every run is a
process of ``finetune`` with a directory in DIR. Finished runs are kept: the same command again goes on, and more specs
or seeds add runs. DIR gets compare.md, compare.csv, compare.json and pictures.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import torch

from lora_ext.commands.comparison_table import table_rows, tabulate
from lora_ext.commands.options import CommandError, Parser, check_installed, refusing
from lora_ext.commands.results import made_by, measured_on, read_json, save_figure, tell, write_json, write_text

_SHORT = {name: f"lora_{name}" for name in ("r", "alpha", "dropout", "targets")} | {"target_modules": "lora_targets"}
_NUMBERS = re.compile(r"[-+0-9.eE]+(,[-+0-9.eE]+)+")


@dataclass(frozen=True)
class PlannedRun:
    """One run of ``finetune``.

    Attributes:
        label: names the runs of one spec in tables, whatever their seed.
        options: those of the spec, by the names of finetune.
        arguments: all of the run, for the command line.
    """

    label: str
    seed: int
    out: Path
    options: dict[str, str]
    arguments: list[str]

    @property
    def metrics(self) -> dict[str, Any] | None:
        """The content of metrics.json, or None if the run has not finished."""
        path = self.out / "metrics.json"
        return read_json(path) if path.exists() else None


def main(argv: Sequence[str]) -> int:
    """Runs the command. Returns 1 if a run failed."""
    check_installed("finetune", "transformers", "accelerate", "datasets", "sklearn", "matplotlib")
    count = next((at for at, word in enumerate(argv) if word.startswith("-")), len(argv))
    parser = Parser(prog="lora-ext compare", usage="lora-ext compare SPEC ... [options] [options of finetune]")
    parser.description = __doc__.replace("``", "")
    parser.add_argument(
        "--seeds", default="0", help="of the new head, the adapters, the order of the texts and dropout"
    )
    parser.add_argument("--out", type=Path, default=Path("comparison"), metavar="DIR", help="directory of all results")
    parser.add_argument("--baseline", metavar="LABEL", help="the others are compared with it; default: the first")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once; they share cores and GPUs")
    parser.add_argument(
        "--launcher", choices=("local", "submitit"), default="local", help="submitit: an array of jobs of a cluster"
    )
    parser.add_argument(
        "--launcher_set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of submitit's executor, such as slurm_partition=gpu, timeout_min=600 or cluster=debug",
    )
    own, rest = parser.parse_known_args(list(argv[count:]))
    if not count:
        raise CommandError("want specs first, such as: lora-ext compare full lora lora:r=2 --seeds 0,1 --out DIR")
    if own.jobs < 1:
        raise CommandError(f"--jobs is {own.jobs}, want at least 1")
    with refusing(f"--seeds {own.seeds}"):
        seeds = [int(seed) for seed in own.seeds.split(",")]
    runs = [run for spec in argv[:count] for run in planned(spec, seeds, own.out, rest)]
    metric = check(runs)
    if own.baseline not in (None, *(labels := dict.fromkeys(run.label for run in runs))):
        raise CommandError(f"--baseline {own.baseline}: there is no such label; want one of {', '.join(labels)}")
    launch = local_launcher(own.jobs) if own.launcher == "local" else submitit_launcher(own)
    todo = [run for run in runs if run.metrics is None]
    tell(f"{len(runs)} runs, {len(runs) - len(todo)} of them finished before, in {own.out}")
    reasons = launch(todo) if todo else []
    failed = [
        {"label": run.label, "seed": run.seed, "reason": reason}
        for run, reason in zip(todo, reasons, strict=True)
        if reason is not None
    ]
    write_results(own, argv, runs, metric, failed)
    for one in failed:
        print(f"lora-ext compare: {one['label']}, seed {one['seed']} failed: {one['reason']}", file=sys.stderr)
    return 1 if failed else 0


def planned(spec: str, seeds: Sequence[int], out: Path, rest: Sequence[str]) -> list[PlannedRun]:
    """Returns the runs of ``spec``, one for each seed and each combination of several numbers."""
    method, *pairs = re.split(r":(?=[\w-]+=)", spec)
    options = {name.replace("-", "_"): value for name, _, value in (pair.partition("=") for pair in pairs)}
    name = options.pop("name", None)
    choices = {key: value.split(",") if _NUMBERS.fullmatch(value) else [value] for key, value in options.items()}
    if "seed" in options or "output_dir" in options or "method" in options:
        raise CommandError(f"{spec}: method, seed and output_dir are not for specs; --seeds has the seeds")
    runs = []
    for values in itertools.product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        label = ":".join([method, *(f"{key}={value}" for key, value in chosen.items())])
        if name is not None:
            varied = [f"{key}={value}" for key, value in chosen.items() if len(choices[key]) > 1]
            label = ":".join([name, *varied])
        given = {_SHORT.get(key, key): value for key, value in chosen.items()}
        for seed in seeds:
            at = out / re.sub(r"[^\w.,=+-]", "_", f"{label}-seed{seed}")
            words = [word for key, value in {"method": method, **given}.items() for word in (f"--{key}", value)]
            arguments = [
                *rest,
                *words,
                "--seed",
                str(seed),
                "--output_dir",
                str(at),
                "--resume_from_checkpoint",
                "true",
            ]
            runs.append(PlannedRun(label, seed, at, given, arguments))
    return runs


def check(runs: Sequence[PlannedRun]) -> str:
    """Finds all mistakes before the first run. Returns the name of the score that is compared.

    CommandError: an option is wrong, two runs have one directory, or a directory holds a run with other options.
    """
    from lora_ext.commands.trainer import prepare_directory
    from lora_ext.commands.training_options import parse

    seen: dict[Path, PlannedRun] = {}
    for run in runs:
        if (other := seen.setdefault(run.out, run)) is not run:
            raise CommandError(f"{run.label} and {other.label} have one directory, {run.out}; give one of them a name=")
        try:
            options, training = parse(run.arguments)
            prepare_directory(options, training)
        except CommandError as error:
            raise CommandError(f"{run.label}: {error}") from error
    return "perplexity" if options.task == "causal-lm" else "accuracy"


def execute(run: PlannedRun, environment: dict[str, str]) -> str | None:
    """Runs finetune, or goes on from its last checkpoint. Returns the last line of its log if it fails."""
    run.out.mkdir(parents=True, exist_ok=True)
    log = run.out.with_suffix(f"{run.out.suffix}.log")
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(
            [sys.executable, "-m", "lora_ext", "finetune", *run.arguments],
            env=os.environ | {"OMP_WAIT_POLICY": "passive"} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code == 0:
        return None
    return (log.read_text(encoding="utf-8").strip().splitlines() or [f"exit status {code}"])[-1]


def local_launcher(jobs: int) -> Callable[[list[PlannedRun]], list[str | None]]:
    """Returns a function that makes ``jobs`` runs at once, each with its part of the cores and a GPU."""
    devices = torch.cuda.device_count()
    if jobs > 1 and devices and jobs > devices:
        raise CommandError(f"--jobs is {jobs}, and there are {devices} GPUs; want at most {devices}")
    slots: Queue[dict[str, str]] = Queue()
    for slot in range(jobs):
        cores = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))} if jobs > 1 else {}
        slots.put(cores | ({"CUDA_VISIBLE_DEVICES": str(slot)} if devices > 1 else {}))

    def one(run: PlannedRun) -> str | None:
        slot = slots.get()
        try:
            reason = execute(run, slot)
        finally:
            slots.put(slot)
        tell(f"{run.label}, seed {run.seed}: {reason or _score(run)}")
        return reason

    def launch(runs: list[PlannedRun]) -> list[str | None]:
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, runs))

    return launch


def _score(run: PlannedRun) -> str:
    metrics = run.metrics
    test = metrics["test"]
    score = f"accuracy {test['accuracy']:.2%}" if "accuracy" in test else f"perplexity {test['perplexity']:.2f}"
    return f"{score}, {metrics['train_seconds']:.0f} s"


def submitit_launcher(own: Any) -> Callable[[list[PlannedRun]], list[str | None]]:
    """Returns a function that submits the runs as one array of jobs, and waits for them."""
    check_installed("submitit", "submitit")
    os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")  # its import would close everybody's log handlers
    import submitit

    given = dict(pair.partition("=")[::2] for pair in own.launcher_set)
    parameters = {name: int(value) if value.isdecimal() else value for name, value in given.items()}
    with refusing("--launcher_set", TypeError, NameError):
        executor = submitit.AutoExecutor(folder=own.out / "jobs", cluster=parameters.pop("cluster", None))
        if executor.cluster == "slurm":
            parameters.setdefault("slurm_array_parallelism", own.jobs)
        executor.update_parameters(**parameters)

    def launch(runs: list[PlannedRun]) -> list[str | None]:
        jobs = executor.map_array(execute, runs, [{}] * len(runs))
        tell(f"submitted {len(jobs)} jobs; their files are in {own.out / 'jobs'}")
        return [_result(job) for job in jobs]

    return launch


def _result(job: Any) -> str | None:
    try:
        return job.result()
    except Exception as error:  # a job that was killed or timed out: the others' results count
        return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def write_results(
    own: Any, argv: Sequence[str], runs: Sequence[PlannedRun], metric: str, failed: list[dict[str, Any]]
) -> None:
    """Writes the table as Markdown, CSV and JSON, and the pictures."""
    from lora_ext.commands import pictures

    done = [(run, metrics) for run in runs if (metrics := run.metrics) is not None]
    if not done:
        raise CommandError(f"no run has finished: {failed[0]['reason']}")
    rows = table_rows(done, metric, own.baseline)
    result = {**made_by("compare", argv), "metric": metric, "baseline": own.baseline or rows[0]["label"]}
    write_json(own.out / "compare.json", {**result, "rows": rows, "failed": failed})
    heading, cells, text = tabulate(rows, metric)
    text += f"\n`{' '.join(result['command'])}`\n\n{measured_on(result)}\n"
    if failed:
        text += f"\nNot complete: {len(failed)} runs failed.\n"
    write_text(own.out / "compare.md", text)
    file = io.StringIO()
    csv.writer(file).writerows([heading, *cells])
    write_text(own.out / "compare.csv", file.getvalue())
    for name in ("scores_against_parameters", "ranks", "matrices"):
        if (figure := getattr(pictures, name)(rows, metric)) is not None:
            save_figure(own.out / f"{name}.png", figure)
    tell(f"\n{text}\nresults in {own.out}")
