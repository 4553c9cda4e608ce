"""``lora-ext plan``: compares a method's memory and disk with full fine-tuning's; finds changes that make it fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from lora_ext._common.install_hint import install_hint
from lora_ext.planner import (
    WEIGHT_DTYPES,
    Change,
    Hardware,
    Memory,
    Planner,
    Setup,
    changes_that_fit,
    costs,
    sizes_of,
)
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_model import method_for, most_tokens
from lora_ext.tasks.plan import results
from lora_ext.tasks.plan.advice import Adapter, finetune_options, warnings
from lora_ext.tasks.plan.models import BUILT_IN, TASKS, ConfigSource, read_config, task_of
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.run_directory import alone_in_out, check_out, prepare_out
from lora_ext.tasks.shared.whole_files import write_json, write_whole

PLAN_FILE = "plan.json"
_OUTPUTS = ("plan.md", "plan.png", PLAN_FILE)
_TASKS = 100  # as in the paper's section 4.2


@dataclass(frozen=True)
class PlanSettings:
    """Settings of a plan.

    Attributes:
        finetune: the model, the method and its options, batch and precision; ``max_length`` is the tokens per text.
        task: one of ``TASKS``; None: from the config.
        num_labels: a classifier's number of labels; None: from the config, or 2.
        attention: transformers' name of the attention implementation; None: its default.
        dtype, optimizer, gradient_checkpointing: as in :class:`lora_ext.planner.Setup`.
        accumulation_steps: number of batches whose gradients are summed.
        device: ``"cuda"`` or ``"cpu"``.
        gpu_memory: bytes of a device; None: whether a run fits is not checked.
        reserve: bytes of ``gpu_memory`` that tensors cannot use: context, library workspaces, fragmentation.
        disk: bytes for checkpoints; None: checkpoints are not counted.
        texts: number of training texts, each of ``max_length`` tokens; None: the adapter's size is not judged by them.
        devices, tensor_parallel: devices that train together, and those of them that split each layer; None: one
            device, no prediction for several.
    """

    finetune: Settings
    task: str | None = None
    num_labels: int | None = None
    attention: str | None = None
    dtype: str = "float32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    accumulation_steps: int = 1
    device: str = "cuda"
    gpu_memory: int | None = None
    reserve: int = 10**9
    disk: int | None = None
    texts: int | None = None
    devices: int | None = None
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise TaskError(f"--task is {self.task!r}, want one of {', '.join(TASKS)}")
        if self.num_labels is not None and self.num_labels < 1:
            raise TaskError(f"--num-labels is {self.num_labels}, want at least 1")
        if self.accumulation_steps < 1:
            raise TaskError(f"--accumulation-steps is {self.accumulation_steps}, want at least 1")
        if self.texts is not None and self.texts < 1:
            raise TaskError(f"--texts is {self.texts}, want at least 1")
        if self.tensor_parallel != 1 and self.devices is None:
            raise TaskError("--tensor-parallel goes with --devices")
        if self.gpu_memory is not None and self.reserve >= self.gpu_memory:
            raise TaskError(f"--reserve takes all of --gpu-memory: {self.reserve:,} of {self.gpu_memory:,} bytes")

    @property
    def texts_per_step(self) -> int:
        return self.finetune.batch_size * self.accumulation_steps

    @property
    def setup(self) -> Setup:
        """The planner's setup. TaskError: a name is unknown."""
        try:
            return Setup(
                self.finetune.batch_size,
                self.finetune.max_length,
                self.dtype,
                self.optimizer,
                self.gradient_checkpointing,
                self.accumulation_steps > 1,
                self.finetune.precision,
            )
        except ValueError as error:
            raise TaskError(f"plan: {error}") from error


@alone_in_out
def plan(
    settings: PlanSettings, out: Path | None = None, *, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Counts the memory and disk of a method, full fine-tuning and inference; writes three files to ``out``.

    ``model="gpt3-175b"``, ``dtype="float16"``, query and value reproduce the paper's figures for GPT-3 175B. Its
    350 GB of memory for LoRA are the float16 weights. The paper does not explain its 1.2 TB for full fine-tuning.
    Weights and Adam's moments in float16 are 6 bytes a parameter, 1.05 TB; LoRA saves "up to 2/3" of that (section
    4.2). With gradients they are 8 bytes: 1.40e12 bytes or 1.27 TiB. Its 35 MB for a checkpoint of rank 4 are 18.9
    million float16 numbers, 37.7e6 bytes or 36 MiB.

    Returns:
        The content of plan.json.

    Raises:
        TaskError: a mistake in the settings, the config or the directory; nothing is written.
    """
    transformers.logging.set_verbosity_error()
    if out is not None:
        check_out(out, None, overwrite, marker=PLAN_FILE, key="runs", what="a plan")
    config, setup = read_config(settings.finetune.model), settings.setup
    if settings.num_labels is not None:
        if (settings.task or task_of(config)) != "classification":
            raise TaskError("--num-labels goes with --task classification; a language model has none")
        config.num_labels = settings.num_labels
    result = _count(settings, config, setup)
    if out is not None:
        prepare_out(out, _OUTPUTS, False, lambda out: write_json(out / PLAN_FILE, result))
        write_whole(out / "plan.md", results.document(result))
        if importlib.util.find_spec("matplotlib") is None:
            say(f"{out / 'plan.png'} is left out, because it needs matplotlib: {install_hint('analyze')}")
        else:
            results.plot(out / "plan.png", result)
    return result


def _count(settings: PlanSettings, config: PretrainedConfig, setup: Setup) -> dict[str, Any]:
    task, method = settings.task or task_of(config), settings.finetune.method

    def planner(name: str | None) -> Planner:
        finetune = settings.finetune.with_method(name or "full")
        adapting = (lambda model: method_for(model, finetune, finetune.model)) if name else None
        return Planner(ConfigSource(config, task, settings.attention, adapting), settings.device)

    # Full fine-tuning cannot train quantised weights; it is planned with their compute dtype.
    setups = {"full": replace(setup, dtype=WEIGHT_DTYPES[setup.dtype].compute_name), method: setup}
    planners, frozen = {name: planner(name) for name in setups}, planner(None)
    try:
        _check_length(planners[method], setup)
        runs = {name: _run(planners[name], run_setup) for name, run_setup in setups.items()}
        inference = frozen.inference(setup)
        capacity = _capacity(settings, task, planners[method], runs)
        devices = _devices(settings, planners, setups, config)
    except (ValueError, TypeError) as error:
        raise TaskError(f"--method {method}: {error}") from error
    except AttributeError as error:  # transformers reads a missing field
        raise TaskError(f"--model: the config of this {config.model_type} is incomplete: {error}") from error
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        # PyTorch computes the shapes of grouped products without data in bfloat16 only.
        hint = "; give --dtype bfloat16" if "BF16" in reason else ""
        raise TaskError(
            f"--model: {config.model_type} cannot run without data, and planning has none: {reason}{hint}"
        ) from error
    return {
        **provenance.made_by(),
        "model": settings.finetune.model or "demo",
        "model_type": config.model_type,
        "task": task,
        "num_labels": config.num_labels if task == "classification" else None,
        "method": method,
        "settings": asdict(settings),
        "parameters": frozen.sizes(setup.dtype).parameters,
        "runs": runs | {"inference": _memory(inference)},
        "capacity": capacity,
        "devices": devices,
        "finetune_options": _options(settings, task, setup),
        "warnings": _warnings(settings, planners[method], setup, config if task == "classification" else None),
        "disk": _disk(settings.disk, inference.weights, runs),
    }


def _check_length(planner: Planner, setup: Setup) -> None:
    most = most_tokens(planner.model(setup.dtype))
    if most is not None and setup.seq_len > most:
        raise TaskError(f"--seq-len is {setup.seq_len}, but the model takes at most {most} tokens")


def _run(planner: Planner, setup: Setup) -> dict[str, Any]:
    sizes, memory = planner.sizes(setup.dtype), planner.training(setup)
    return _memory(memory) | {
        "dtype": setup.dtype,
        "trained_parameters": sizes.trained,
        "checkpoint_bytes": sizes.trained_bytes,
        "checkpoint_16_bit_bytes": 2 * sizes.trained,
    }


def _memory(memory: Memory) -> dict[str, Any]:
    return asdict(memory) | {"peak": memory.peak}


def _options(settings: PlanSettings, task: str, setup: Setup) -> list[str] | None:
    finetune = settings.finetune
    if finetune.model in BUILT_IN:  # which only has a config
        finetune = replace(finetune, model="PATH_OR_ID")
    return finetune_options(finetune, setup, settings.texts_per_step, task == "classification")


def _capacity(settings: PlanSettings, task: str, planner: Planner, runs: Mapping[str, Any]) -> dict[str, Any] | None:
    if settings.gpu_memory is None:
        return None
    usable = settings.gpu_memory - settings.reserve
    fits = {name: run["peak"] <= usable for name, run in runs.items()}
    changes = [] if fits[settings.finetune.method] else changes_that_fit(planner, settings.setup, usable)
    return {"usable": usable, "fits": fits, "changes": [_change(change, settings, task) for change in changes]}


def _devices(
    settings: PlanSettings, planners: Mapping[str, Planner], setups: Mapping[str, Setup], config: PretrainedConfig
) -> dict[str, Any] | None:
    """Predicts a step on several devices, for each run. TaskError: they cannot be split so."""
    if settings.devices is None:
        return None
    predicted = {}
    for name, planner in planners.items():
        sizes = sizes_of(planner, setups[name], config.hidden_size, config.num_hidden_layers)
        moments = planner.moments(setups[name])
        try:
            found = costs(moments, sizes, setups[name], settings.devices, settings.tensor_parallel)
        except ValueError as error:
            raise TaskError(f"--tensor-parallel: {error}") from error
        predicted[name] = asdict(found) | {
            "step_seconds": found.step_seconds,
            "tokens_per_second": found.tokens_per_second,
        }
    return {"hardware": asdict(Hardware()), "runs": predicted}


def _change(change: Change, settings: PlanSettings, task: str) -> dict[str, Any]:
    options = None  # finetune does not shard
    if change.devices == 1:
        options = _options(settings, task, change.setup)
    return {
        "what": change.what,
        "devices": change.devices,
        "setup": asdict(change.setup),
        "finetune_options": options,
        **_memory(change.memory),
    }


def _warnings(settings: PlanSettings, planner: Planner, setup: Setup, classifier: PretrainedConfig | None) -> list[str]:
    """Returns the lines that warn of a run. ``classifier``: a classifier's config, None for a language model."""
    parameters = full_rank = 0
    for module in planner.model(setup.dtype).modules():
        lora_A, lora_B = (module._parameters.get(name) for name in ("lora_A", "lora_B"))
        if lora_A is not None and lora_B is not None and lora_A.requires_grad:
            parameters += lora_A.numel() + lora_B.numel()
            full_rank = max(full_rank, min(lora_A.numel() // lora_A.shape[0], lora_B.numel() // lora_B.shape[-1]))
    num_labels = None if classifier is None else classifier.num_labels
    texts_per_step = settings.texts_per_step
    adapter = Adapter(parameters, full_rank)
    return warnings(settings.finetune, texts_per_step, adapter, setup.seq_len, settings.texts, num_labels)


def _disk(disk: int | None, base: int, runs: Mapping[str, Any]) -> dict[str, Any]:
    """Counts bytes of checkpoints; every method except full fine-tuning also needs the base model once."""
    shared = {name: 0 if name == "full" else base for name in runs}
    return {
        "base_bytes": base,
        "tasks": _TASKS,
        "tasks_bytes": {name: shared[name] + _TASKS * run["checkpoint_bytes"] for name, run in runs.items()},
        "tasks_16_bit_bytes": {
            name: shared[name] + _TASKS * run["checkpoint_16_bit_bytes"] for name, run in runs.items()
        },
        "checkpoints": disk
        and {name: max(disk - shared[name], 0) // run["checkpoint_bytes"] for name, run in runs.items()},
    }
