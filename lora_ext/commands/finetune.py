"""``lora-ext finetune``: Transformers' Trainer or TRL's SFTTrainer with LoRA, or another method of its paper.

Every field of TrainingArguments (of SFTConfig with ``--task causal-lm``) is an option; ``--config FILE`` reads options
from YAML or JSON. ``--output_dir`` gets adapter/ (or model/), metrics.json, loss_curve.png, predictions.jsonl,
checkpoint-*/ and, if wanted, merged/. ``torchrun -m lora_ext finetune ...`` and ``accelerate launch -m lora_ext
finetune ...`` train with several processes; the batch size is that of each.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from lora_ext.adapters import trainable_parameter_counts
from lora_ext.commands import demo
from lora_ext.commands.merged_model import check_mergeable, write_merged
from lora_ext.commands.options import check_installed, is_first_process
from lora_ext.commands.pictures import loss_curve
from lora_ext.commands.results import made_by, readable, save_figure, tell, write_json
from lora_ext.commands.trainer import Clock, begin, prepare_directory
from lora_ext.commands.training_options import TaskOptions, parse, record_of, task_of
from lora_ext.methods import save_method


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    check_installed("finetune", "transformers", "accelerate", "datasets", "sklearn", "matplotlib")
    if task_of(argv) == "causal-lm":
        check_installed("finetune-lm", "trl", "rouge_score")
    options, training = parse(argv)
    if training.disable_tqdm:  # a pipe or a file
        datasets.disable_progress_bars()
        logging.disable_progress_bar()
    fine_tune(options, training, argv)


def fine_tune(options: TaskOptions, training: TrainingArguments, argv: Sequence[str]) -> dict[str, Any]:
    """Trains, evaluates and writes the results. Returns the content of metrics.json."""
    if options.task == "causal-lm":
        from lora_ext.commands import language_model as task
    else:
        from lora_ext.commands import classification as task
    if options.merged:
        check_mergeable(options, training)
    checkpoint = prepare_directory(options, training)
    uses_demo = options.model is None and options.data is None
    with training.main_process_first(desc="loading"):
        sides = task.load(options)
    set_seed(training.seed)  # for the new head and the adapters
    run = task.Run(options, training, sides)
    trained, total = trainable_parameter_counts(run.trainer.model)
    sizes = ", ".join(f"{len(rows):,} for {side}" for side, rows in sides.items())
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    say(f"{options.data or 'the demo data'}: {sizes}; {run.about}")
    say(f"{options.method} trains {trained:,} of {total:,} parameters ({trained / total:.2%}); {batch} texts a step")
    if training.process_index == 0:
        begin(options, training)
    before = run.before()
    run.trainer.train(resume_from_checkpoint=checkpoint)
    say("evaluating on the test texts ...")
    scores, predictions = run.after()
    out = Path(training.output_dir)
    save(run, options.method, out)
    merged = {}
    if options.merged:
        say("merging the adapter, and evaluating once more ...")
        merged = {"merged": write_merged(run, out / "merged")}
    metrics = {
        **made_by("finetune", argv),
        "task": options.task,
        "method": options.method,
        **record_of(options, training),
        "examples": {side: len(rows) for side, rows in sides.items()},
        "trainable_parameters": trained,
        "total_parameters": total,
        "head_parameters": run.head_parameters,
        "processes": training.world_size,
        "global_batch_size": batch,
        "steps": run.trainer.state.global_step,
        **_costs(run.trainer),
        "adapter_bytes": sum(file.stat().st_size for file in (out / _directory(options.method)).iterdir()),
        "full_checkpoint_bytes": run.full_checkpoint_bytes,
        "history": run.trainer.state.log_history,
        "best_checkpoint": run.trainer.state.best_model_checkpoint,
        **before,
        **scores,
        **merged,
    }
    if training.process_index == 0:
        run.write_predictions(out / "predictions.jsonl", predictions)
        title = f"{options.method}, {len(run.trainer.train_dataset):,} rows"
        save_figure(out / "loss_curve.png", loss_curve(run.trainer.state.log_history, title))
        write_json(out / "metrics.json", metrics)  # written last: a run that has it is whole
    say(f"\n{summary(run.figures(metrics), metrics)}\n\nresults in {out}")
    say(demo.CREDITS[options.task] if uses_demo else "")
    return metrics


def say(text: str) -> None:
    """Prints a line, in the first process only."""
    if text and is_first_process():
        tell(text)


def save(run: Any, method: str, out: Path) -> None:
    """Writes ``adapter/``, or ``model/`` of full fine-tuning; sharded weights are gathered by Trainer."""
    trainer, directory = run.trainer, out / _directory(method)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        trainer.save_model(str(directory))
    elif trainer.is_world_process_zero():
        if method == "full":
            trainer.model.save_pretrained(directory)
        else:
            save_method(trainer.model, directory)
    if method == "full" and trainer.is_world_process_zero():
        run.tokenizer.save_pretrained(directory)
    trainer.accelerator.wait_for_everyone()


def _directory(method: str) -> str:
    return "model" if method == "full" else "adapter"


def _costs(trainer: Trainer) -> dict[str, float]:
    """Returns seconds of training, tokens (without padding) per second, and the peak memory of this process."""
    clock = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Clock))
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tokens = trainer.state.num_input_tokens_seen
    return {
        "train_seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds if clock.seconds else 0.0,
        "peak_memory_bytes": peak,
    }


def summary(rows: list[tuple[str, str]], metrics: dict[str, Any]) -> str:
    """Formats the figures of a run for the terminal: its scores, then what it cost."""
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    rows = [
        ("parameters trained", f"{trained:,} of {total:,} ({trained / total:.2%})"),
        *rows,
        *((f"merged: {name}", f"{score:.4g}") for name, score in metrics.get("merged", {}).items()),
        ("training", f"{metrics['train_seconds']:.0f} s, {metrics['tokens_per_second']:,.0f} tokens/s"),
        ("peak memory", readable(metrics["peak_memory_bytes"])),
        ("on disk", f"{readable(metrics['adapter_bytes'])} of {readable(metrics['full_checkpoint_bytes'])}"),
    ]
    return "\n".join(f"  {name:<20} {value}" for name, value in rows)
