"""Options of ``lora-ext finetune``: dataclasses of ours next to TrainingArguments or SFTConfig."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from lora_ext._common.messages import suggestion
from lora_ext.commands.options import CommandError, Parser, refusing
from lora_ext.methods import METHODS, option_names

RATES = {"full": 1e-4, "bitfit": 2e-3, "prefix-embed": 3.2e-2, "prefix-layer": 1.6e-2, "head-only": 5e-3}
"""Default learning rates of a classifier by method; 1e-3 for others, the smallest of the parts for a combination.

Each holds on the demo's reviews and on UIT-VSFC (benchmarks/results/vietnamese/findings.md, "The other methods").
"""

_FILES = (".csv", ".tsv", ".jsonl", ".gguf")  # endings that no hub id has

WITH_EMBEDDINGS = {"lora_targets": "all-linear,embeddings", "modules_to_save": "auto", "lora_r": 4}
"""Defaults of LoRA in a classifier if no layers are named; with them go alpha = 0.2 r, a rate of 2e-4, LoRA+ at 60 and
a moving average. It lost nothing against full fine-tuning, with less than 2 % of the parameters: docs/cli.md."""


def adapts_embeddings(options: Any) -> bool:
    """Returns whether :data:`WITH_EMBEDDINGS` are the defaults; ``lora_targets`` is as the user gave it."""
    is_lora_classifier = options.task == "classification" and options.method == "lora"
    return is_lora_classifier and options.lora_targets is None and options.quantize == "none"


def _help(text: str, default: Any = None) -> Any:
    return field(metadata={"help": text}, default=default)


@dataclass
class TaskOptions:
    """Options of both tasks. None stands for a default that depends on the method."""

    _argument_group_name: ClassVar[str] = "the model, the data and the method"

    task: Literal["classification", "causal-lm"] = _help("What to train.", default="classification")
    model: str | None = _help("Directory or hub id of the model; the demo's if left out.")
    data: str | None = _help("File (.csv, .tsv, .jsonl) or hub id of a data set; the demo's if left out.")
    validation_file: str | None = _help("Validate on this file instead of a part of --data.")
    test_file: str | None = _help("Test on this file instead of a part of --data.")
    validation_split: float = _help("Part of --data to validate on after each epoch.", default=0.1)
    test_split: float = _help("Part of --data held out until the end.", default=0.1)
    text_column: str = _help("Column of the texts.", default="text")
    method: str = _help(f"{', '.join(METHODS)}, or several joined by +.", default="lora")
    lora_r: int | None = _help("Rank of the adapters.")
    lora_alpha: float | None = _help("The update is scaled by lora_alpha / lora_r.")
    lora_dropout: float | None = _help("Dropout on the adapters' input.")
    lora_targets: str | None = _help("q,k,v,o; or module names, all-linear and embeddings among them; or a regex.")
    modules_to_save: str | None = _help("Modules to train in full with the head; auto: the pooler, if there is one.")
    lora_plus_ratio: float | None = _help("Learning rate of lora_B over that of the rest (LoRA+, arXiv 2402.12354).")
    ema_decay: float | None = _help("Decay of a moving average of the trained weights, which is kept; 0: none.")
    bottleneck_size: int = _help("Hidden features of adapter-h, -l, -p and -drop.", default=16)
    drop_layers: int | None = _help("Lower layers without adapter-drop's adapters; 5 of 12 if left out.")
    prefix_length: int = _help("Trained tokens before the input: prefix-embed, -layer.", default=8)
    infix_length: int = _help("Trained tokens after the input.", default=0)
    quantize: Literal["none", "nf4", "int8"] = _help("Quantise the frozen weights by bitsandbytes.", default="none")
    dtype: Literal["float32", "bfloat16"] = _help(
        "Of the checkpoint's weights; adapters stay float32.", default="float32"
    )
    merged: bool = _help("Write the model with the adapter merged, too, to merged/.", default=False)
    early_stopping: int | None = _help("Stop after so many evaluations without a better --metric_for_best_model.")
    overwrite: bool = _help("Replace the run in --output_dir.", default=False)

    def __post_init__(self) -> None:
        parts = self.method.split("+")
        for name in parts:
            if name not in METHODS:
                raise CommandError(
                    f"--method {self.method}: there is no method {name!r}{suggestion(name, METHODS)}; want one of "
                    f"{', '.join(METHODS)}, or several joined by +"
                )
        for name, wanted in _OWNERS.items():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default and not {*wanted} & {*parts}:
                raise CommandError(f"--{name} goes with {', '.join(wanted)}, not with --method {self.method}")
        if self.quantize != "none" and "full" in parts:
            raise CommandError(f"--quantize {self.quantize} freezes the weights, and --method full trains them")
        for name in ("validation_file", "test_file"):
            if getattr(self, name) and not self.data:
                raise CommandError(f"--{name} goes with --data; the demo data is split by itself")
        for name in ("validation_split", "test_split"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise CommandError(f"--{name} is {getattr(self, name)}, want 0 <= {name} < 1")
        if self.ema_decay is not None and not 0.0 <= self.ema_decay < 1.0:
            raise CommandError(f"--ema_decay is {self.ema_decay}, want 0 <= ema_decay < 1, such as 0.99; 0: no average")
        for name in ("model", "data", "validation_file", "test_file"):
            self._check_exists(name)
        self._fill()

    def _check_exists(self, name: str) -> None:
        """Refuses a path that does not exist, which Transformers and datasets would take for a hub id."""
        text = getattr(self, name)
        if text is None:
            return
        path = Path(text).expanduser()
        for file in ("adapter_config.json", "method.json"):
            if name == "model" and (path / file).is_file():  # Transformers would load its base
                raise CommandError(f"--model {text} is an adapter (it holds {file}); name its base, or merge the two")
        if path.exists():
            setattr(self, name, str(path.resolve()))  # a resumed run may start elsewhere
        elif path.suffix in _FILES or text.startswith(("/", ".", "~")) or text.count("/") > 1:
            raise CommandError(f"--{name} {text}: there is no such file or directory")

    def _fill(self) -> None:
        """Puts the defaults that depend on the method in the place of None."""
        embeddings = adapts_embeddings(self)
        if embeddings:
            defaults = {**WITH_EMBEDDINGS, "lora_plus_ratio": 60.0, "ema_decay": 0.995}
        else:
            defaults = {"lora_targets": "all-linear", "lora_r": 8, "lora_plus_ratio": 1.0, "ema_decay": 0.0}
        defaults["lora_dropout"] = 0.1 if self.task == "classification" else 0.05
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        if self.lora_alpha is None:
            self.lora_alpha = round(0.2 * self.lora_r, 6) if embeddings else 16.0


@dataclass
class ClassifierOptions(TaskOptions):
    """Options of ``--task classification``."""

    label_column: str = _help("Column of the labels, strings or integers.", default="label")
    max_length: int = _help("Tokens of a text; longer ones are cut.", default=128)
    class_weights: Literal["none", "balanced"] = _help(
        "balanced: every class counts alike in the loss.", default="none"
    )
    pooling: Literal["default", "mean", "cls"] = _help(
        "What the head of BERT or RoBERTa reads: the mean over the tokens, or the first token.", default="default"
    )


@dataclass
class LanguageModelOptions(TaskOptions):
    """Options of ``--task causal-lm``."""

    answers: int = _help("Test prompts that are answered before and after training.", default=100)
    max_new_tokens: int = _help("Longest answer, in tokens.", default=64)

    def __post_init__(self) -> None:
        super().__post_init__()
        suitable = [name for name in METHODS if not name.startswith("prefix") and name != "head-only"]
        if wrong := [name for name in self.method.split("+") if name not in suitable]:
            raise CommandError(f"--method {wrong[0]} is not for language models, want one of {', '.join(suitable)}")


_OURS = {"lora_r": "r", "lora_targets": "target_modules"}
_OWNERS = {
    field.name: [name for name in METHODS if _OURS.get(field.name, field.name) in option_names(name)]
    for field in fields(TaskOptions)
}
_OWNERS = {name: owners for name, owners in _OWNERS.items() if owners} | {"lora_plus_ratio": ["lora"]}
"""``{option: methods}`` for the options that only some methods have."""


def training_defaults(given: Any, task: str) -> dict[str, Any]:
    """Returns the defaults of TrainingArguments that are ours; ``given`` has the options of :class:`TaskOptions`."""
    on_gpu, names = torch.cuda.is_available(), given.method.split("+")
    shared: dict[str, Any] = {
        "output_dir": "out",
        "num_train_epochs": 2.0,
        "warmup_steps": 0.1,  # below 1: a part of all steps
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "logging_steps": 0.02,
        "seed": 0,
        "report_to": "none",
        "use_cpu": not on_gpu,  # torchrun would start independent runs without it
        "dataloader_pin_memory": on_gpu,
        "disable_tqdm": not sys.stderr.isatty(),
        "restore_callback_states_from_checkpoint": True,
    }
    if task == "causal-lm":
        rate = 5e-5 if "full" in names else 5e-4  # ten times, as in "LoRA Without Regret" (Schulman et al. 2025)
        batch = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
        # SFTConfig's own defaults are bfloat16 and gradient checkpointing, on a CPU, too.
        own = {"bf16": on_gpu, "gradient_checkpointing": False, "eval_packing": False}
        return {**shared, **batch, **own, "learning_rate": rate}
    with_embeddings = adapts_embeddings(given)
    return {
        **shared,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "learning_rate": 2e-4 if with_embeddings else min(RATES.get(name, 1e-3) for name in names),
        "lr_scheduler_type": "constant_with_warmup" if with_embeddings else "linear",
        "train_sampling_strategy": "group_by_length",
    }


class _Parser(Parser, HfArgumentParser):
    """Transformers' parser of dataclasses, with errors of one line."""


def task_of(argv: Sequence[str]) -> str:
    """Returns the value of ``--task``, which decides what other options there are."""
    parser = Parser(add_help=False)
    parser.add_argument("--task", default=_configured(argv).get("task", "classification"))
    task = parser.parse_known_args(argv)[0].task
    if task not in ("classification", "causal-lm"):
        raise CommandError(f"--task is {task!r}, want classification or causal-lm")
    return task


def parse(argv: Sequence[str]) -> tuple[TaskOptions, TrainingArguments]:
    """Returns the options: defaults of the classes, then ours, then those of ``--config``, then of the command line.

    CommandError: an option is unknown, wrong, or does not go with another one.
    """
    task = task_of(argv)
    ours, theirs = ClassifierOptions, TrainingArguments
    if task == "causal-lm":
        from trl import SFTConfig

        ours, theirs = LanguageModelOptions, SFTConfig
    parser = _Parser((ours, theirs), prog="lora-ext finetune", description=f"Fine-tunes a model: {task}.")
    config = _configured(argv)
    known = {action.dest for action in parser._actions} - {"help"}
    if unknown := sorted(config.keys() - known):
        raise CommandError(f"--config: there is no option {unknown[0]!r}{suggestion(unknown[0], known)}")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON with options; those of the command line win")
    parser.set_defaults(**config)
    given, unknown_options = parser.parse_known_args(list(argv))
    parser.refuse_unknown(unknown_options)
    parser.set_defaults(**training_defaults(given, task) | config)
    values = vars(parser.parse_args(list(argv)))
    values.pop("config")
    with refusing("", TypeError):
        options, training = (
            kind(**{item.name: values[item.name] for item in fields(kind) if item.init and item.name in values})
            for kind in (ours, theirs)
        )
    training.include_num_input_tokens_seen = "non_padding"  # the parser of dataclasses takes this field for a bool
    _check_together(options, training)
    return options, training


def _configured(argv: Sequence[str]) -> dict[str, Any]:
    """Returns the options of ``--config FILE``; JSON is YAML."""
    parser = Parser(add_help=False)
    parser.add_argument("--config")
    path = parser.parse_known_args(list(argv))[0].config
    if path is None:
        return {}
    with refusing(f"--config {path}", yaml.YAMLError):
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CommandError(f"--config {path}: want options, one in a line, such as `lora_r: 8`")
    return {
        str(name).replace("-", "_"): ",".join(map(str, value)) if isinstance(value, list) else value
        for name, value in content.items()
    }


def _check_together(options: TaskOptions, training: TrainingArguments) -> None:
    if options.early_stopping is not None and not training.load_best_model_at_end:
        raise CommandError("--early_stopping goes with --load_best_model_at_end true and --metric_for_best_model")
    no_validation = options.validation_split == 0.0 and options.validation_file is None
    if no_validation and training.load_best_model_at_end:
        raise CommandError("--load_best_model_at_end needs validation texts: --validation_split above 0, or a file")
    if no_validation:
        training.eval_strategy = "no"
    if options.ema_decay and (training.deepspeed or training.fsdp):
        raise CommandError("--ema_decay does not go with FSDP or DeepSpeed, which shard the optimizer; --ema_decay 0")


def record_of(options: TaskOptions, training: TrainingArguments) -> dict[str, Any]:
    """Returns what decides a run's result, as JSON values: a run is resumed with the same."""
    default = {item.name: item.default for item in fields(training) if item.name not in _NOT_RECORDED}
    values = training.to_dict()
    kept = {name: values[name] for name in default if name in values and values[name] != default[name]}
    return {"options": {k: v for k, v in asdict(options).items() if k != "overwrite"}, "training": kept}


_NOT_RECORDED = {"output_dir", "resume_from_checkpoint", "disable_tqdm", "use_cpu", "dataloader_pin_memory"}
_NOT_RECORDED |= {"local_rank", "logging_dir", "report_to", "run_name", "push_to_hub_token", "hub_token", "project"}
