"""``lora-ext plan``: predicts the memory of a method, next to full fine-tuning, and what makes it fit."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.commands import demo
from lora_ext.commands.options import CommandError, Parser, check_installed, refusing, size
from lora_ext.commands.results import columns, made_by, readable, tell, to_json, write_json
from lora_ext.methods import METHODS
from lora_ext.planner import DEVICES, OPTIMIZERS, WEIGHT_DTYPES, Change, DeviceKernels, Planner, Setup, changes_that_fit

PLAN_FILE = "plan.json"
TASKS = {"classification": "AutoModelForSequenceClassification", "causal-lm": "AutoModelForCausalLM"}
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
_SIZES += ("num_key_value_heads", "vocab_size", "max_position_embeddings")
BUILT_IN = {
    # Brown et al. 2020, arXiv 2005.14165, table 2.1, with GPT-2's vocabulary, which it reportedly uses. Attention is
    # dense in every layer; the original's is sparse in every second one, which changes no weight.
    "gpt3-175b": ("gpt2", (96, 12288, 49152, 96, 96, 50257, 2048)),
    # Llama 3: arXiv 2407.21783, table 3, with the vocabulary of the published weights.
    "llama3-8b": ("llama", (32, 4096, 14336, 32, 8, 128256, 131072)),
    "llama3-70b": ("llama", (80, 8192, 28672, 64, 8, 128256, 131072)),
    "llama3-405b": ("llama", (126, 16384, 53248, 128, 8, 128256, 131072)),
}
"""Shapes by name: Transformers' model type, and the numbers of ``_SIZES``."""

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_OF_METHODS = dict.fromkeys(("lora_r", "bottleneck_size", "drop_layers", "prefix_length", "infix_length"), int)
_OF_METHODS |= {"lora_alpha": float, "lora_dropout": float, "lora_targets": str, "modules_to_save": str}
_ALIASES = {"lora_r": ["--r"], "lora_targets": ["--target_modules"]}
_CHANGEABLE = {"gradient_checkpointing": "gradient_checkpointing", "batch_size": "per_device_train_batch_size"}
_CHANGEABLE |= {"seq_len": "max_length", "dtype": "dtype"}  # keys of Setup and options of finetune
_KINDS = {  # keys in plan.json and their names
    "weights": "weights",
    "optimizer_state": "optimizer state",
    "gradients": "gradients",
    "activations": "activations, temporaries",
    "peak": "peak",
    "kept": "kept for the backward",
    "all_gradients": "all gradients",
    "checkpoint_bytes": "checkpoint",
    "checkpoint_16_bit_bytes": "checkpoint in 16 bits",
}


def main(argv: list[str]) -> None:
    args = parse(argv)
    check_installed("plan", "transformers")
    if args.out is not None and (args.out / PLAN_FILE).exists() and not args.overwrite:
        raise CommandError(f"--out {args.out} holds a plan already; --overwrite replaces it")
    result = made_by("plan", argv) | plan(args)
    if args.out is not None:
        write_json(args.out / PLAN_FILE, result)
    if args.json:
        print(to_json(result), end="")
    else:
        tell("\n".join([title(result), columns(rows(result)), *notes(result)]))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the options of :func:`plan`; their names can be spelt with - and with _."""
    parser = Parser(
        prog="lora-ext plan",
        description="Counts the memory of a training step without data and weights, next to full fine-tuning's.",
    )

    def add(*names: str, **how: Any) -> None:
        spellings = [spelling for name in names for spelling in (name, f"--{name[2:].replace('_', '-')}")]
        parser.add_argument(*dict.fromkeys(spellings), dest=names[0][2:], **how)

    number = {"type": _at_least_1, "metavar": "N"}
    add("--model", help=f"config: file, directory, hub id, or one of {', '.join(BUILT_IN)}; default: the demo model")
    add("--task", choices=TASKS, help="default: as in the config")
    add("--num_labels", **number, help="classes of a classifier; default: as in the config")
    add("--method", default="lora", help=f"{', '.join(METHODS)}, or several joined by +")
    for name, kind in _OF_METHODS.items():
        add(f"--{name}", *_ALIASES.get(name, ()), type=kind, default=argparse.SUPPRESS, help="as in finetune")
    add("--batch_size", "--per_device_train_batch_size", default=16, **number, help="texts a batch")
    add("--max_length", "--seq_len", default=128, **number, help="tokens a text, none of them padding")
    add("--gradient_accumulation_steps", "--accumulation_steps", default=1, **number, help="batches a step")
    add("--gradient_checkpointing", action="store_true", help="layers keep only their inputs")
    dtype = {"type": lambda text: _DTYPES.get(text, text), "choices": WEIGHT_DTYPES}
    add("--dtype", "--quantize", default="float32", **dtype, help="of frozen weights")
    add("--optimizer", default="adamw", choices=OPTIMIZERS)
    add("--attn_implementation", "--attention", choices=["sdpa", "eager"], help="default: Transformers' choice")
    add("--device", default="cuda", choices=DEVICES, help="whose kernels are assumed")
    add("--devices", default=1, **number, help="that share weights, gradients and optimizer state (FSDP)")
    add("--gpu_memory", type=size, metavar="SIZE", help="such as 80GB or 80GiB: says whether training fits")
    add("--reserve", type=size, default="1GB", metavar="SIZE", help="part of it that tensors cannot use")
    add("--out", type=Path, metavar="DIR", help=f"directory for {PLAN_FILE}")
    add("--overwrite", action="store_true", help="replace the plan in --out")
    add("--json", action="store_true", help="print the plan as JSON")
    return parser.parse_args(argv)


def _at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}, want a whole number of at least 1")
    return int(text)


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the content of plan.json: memory of a method and of full fine-tuning. CommandError: a wrong option."""
    if args.gpu_memory is not None and args.reserve >= args.gpu_memory:
        raise CommandError(f"--reserve takes all of --gpu_memory: {args.reserve:,} of {args.gpu_memory:,} bytes")
    config = read_config(args)
    if args.num_labels is not None and args.task != "classification":
        raise CommandError("--num_labels goes with --task classification; a language model has none")
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < args.max_length:
        raise CommandError(f"--max_length is {args.max_length}, but the model takes at most {most} tokens")
    sizes = args.batch_size, args.max_length, args.dtype, args.optimizer
    setup = Setup(*sizes, args.gradient_checkpointing, accumulates=args.gradient_accumulation_steps > 1)
    # Full fine-tuning cannot train quantised weights; it is planned with their compute dtype.
    setups = {"full": replace(setup, dtype=WEIGHT_DTYPES[args.dtype].compute), args.method: setup}
    usable = None if args.gpu_memory is None else args.gpu_memory - args.reserve
    with refusing(f"--method {args.method}", TypeError, RuntimeError):
        planners = {name: planner_of(config, name, args) for name in setups}
        runs = {name: _run(planner, setups[name], args.devices, usable) for name, planner in planners.items()}
        is_too_large = runs[args.method]["fits"] is False and args.devices == 1
        changes = changes_that_fit(planners[args.method], setup, usable) if is_too_large else []
    return {
        "model": args.model or "demo",
        "model_type": config.model_type,
        "task": args.task,
        "num_labels": config.num_labels if args.task == "classification" else None,
        "method": args.method,
        "options": vars(args),
        "runs": runs,
        "usable": usable,
        "changes": [_change(change, setup, args.gradient_accumulation_steps) for change in changes],
    }


def read_config(args: argparse.Namespace) -> Any:
    """Returns the config of ``--model``; sets the task that is not given. CommandError: there is no such config."""
    from transformers import AutoConfig

    if args.model in BUILT_IN:
        kind, sizes = BUILT_IN[args.model]
        config = AutoConfig.for_model(kind, **dict(zip(_SIZES, sizes, strict=True)), architectures=["ForCausalLM"])
    else:
        path = args.model or demo.classifier()
        neither = f"--model {path} is neither a config that Transformers knows nor {', '.join(BUILT_IN)}"
        with refusing(neither, KeyError):
            config = AutoConfig.from_pretrained(path)
    if args.task is None:
        is_language_model = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in config.architectures or ())
        args.task = "causal-lm" if is_language_model else "classification"
    if args.num_labels or args.model is None:
        config.num_labels = args.num_labels or 3
    if config.pad_token_id is None:  # a classifier needs one
        config.pad_token_id = 0
    config.use_cache = False  # as the Trainer sets it
    return config


def planner_of(config: Any, method: str, args: argparse.Namespace) -> Planner:
    """Returns the planner of ``config``'s model, adapted by ``method`` with the options in ``args``."""
    import transformers

    from lora_ext.commands.adapting import adapt
    from lora_ext.commands.training_options import TaskOptions

    transformers.logging.set_verbosity_error()
    given = {name: getattr(args, name) for name in _OF_METHODS if method == args.method and hasattr(args, name)}
    if args.dtype in ("int8", "nf4"):
        given["quantize"] = args.dtype if method == args.method else "none"
    options = TaskOptions(task=args.task, model=args.model, method=method, **given)

    def build(dtype: torch.dtype, gradient_checkpointing: bool) -> nn.Module:
        auto, attention = getattr(transformers, TASKS[args.task]), args.attn_implementation
        with torch.device("meta"):
            model = auto.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation=attention).train()
        adapt(model, options, drawn=())
        if gradient_checkpointing:
            # Earlier releases of Transformers have the second name only.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            # Real training also keeps the random generator's state, 5 KB a layer; the meta device has none.
            again = {"context_fn": lambda: (nullcontext(), DeviceKernels(args.device))}
            enable({"use_reentrant": False, "preserve_rng_state": False, **again})
        return model

    def loss(model: nn.Module, batch_size: int, seq_len: int) -> Tensor:
        ids = torch.zeros(batch_size, seq_len, dtype=torch.long, device="meta")
        return model(input_ids=ids, labels=ids if args.task == "causal-lm" else ids[:, 0]).loss

    return Planner(build, loss, args.device)


def _run(planner: Planner, setup: Setup, devices: int, usable: int | None) -> dict[str, Any]:
    parameters, memory = list(planner.model(setup.dtype).parameters()), planner.training(setup).sharded(devices)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return {
        **asdict(memory),
        "peak": memory.peak,
        "fits": None if usable is None else memory.peak <= usable,
        "dtype": setup.dtype,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": trained,
        "checkpoint_bytes": memory.all_gradients,  # each trained number once
        "checkpoint_16_bit_bytes": 2 * trained,
    }


def _change(change: Change, setup: Setup, steps: int) -> dict[str, Any]:
    """Returns the options that differ from those of ``setup``, the devices and the peak of one."""
    old, new, options = asdict(setup), asdict(change.setup), []
    for key, name in _CHANGEABLE.items():
        if old[key] != new[key]:
            name = "quantize" if new[key] in ("int8", "nf4") else name
            options.append(f"--{name}" if new[key] is True else f"--{name} {new[key]}")
    if setup.batch_size != change.setup.batch_size:
        options.append(f"--gradient_accumulation_steps {-(-steps * setup.batch_size // change.setup.batch_size)}")
    if change.devices > 1:
        options.append(f"--devices {change.devices}")
    return {"options": " ".join(options), "setup": new, "devices": change.devices, "peak": change.memory.peak}


def title(result: dict[str, Any]) -> str:
    """Describes the model and the run in one line."""
    options, parameters = result["options"], result["runs"]["full"]["parameters"]
    run = f"{options['optimizer']}, {options['batch_size']} x {options['max_length']} tokens, {options['device']}"
    run += ", gradient checkpointing" if options["gradient_checkpointing"] else ""
    run += f", each of {options['devices']} devices" if options["devices"] > 1 else ""
    model = f"{result['model']}: {result['model_type']}, {parameters:,} parameters, {result['task']}"
    return f"{model}; {options['dtype']} weights, {run}"


def rows(result: dict[str, Any]) -> list[list[str]]:
    """Returns the table, with a column for full fine-tuning and one for the method."""
    runs = result["runs"].values()
    table = [["", *result["runs"]], ["parameters trained", *(f"{run['trained_parameters']:,}" for run in runs)]]
    return table + [[text, *(readable(run[key]) for run in runs)] for key, text in _KINDS.items()]


def notes(result: dict[str, Any]) -> list[str]:
    """Returns lines that say which runs fit into the memory, and which changes would make the method fit."""
    if result["usable"] is None:
        return []
    room = f"{readable(result['usable'])} (without --reserve)"
    fits = {True: "fits", False: "does not fit"}
    lines = [f"{name} {fits[run['fits']]} into {room}: {readable(run['peak'])}" for name, run in result["runs"].items()]
    if result["changes"]:
        lines.append(f"{result['method']} fits with one of these:")
        lines += [f"  {change['options']}: {readable(change['peak'])}" for change in result["changes"]]
    elif not result["runs"][result["method"]]["fits"] and result["options"]["devices"] == 1:
        lines.append(f"{result['method']} would not fit with any change that was tried.")
    return lines
