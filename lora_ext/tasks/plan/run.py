"""``lora-ext plan``: what memory and disk a method takes, beside full fine-tuning, and what makes it fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig

from lora_ext._common.install_hint import install_hint
from lora_ext.planner import WEIGHT_DTYPES, Change, Memory, Planner, Setup, changes_that_fit
from lora_ext.tasks import TaskError
from lora_ext.tasks.finetune.settings import Settings
from lora_ext.tasks.finetune.task_model import method_for, most_tokens
from lora_ext.tasks.plan import results
from lora_ext.tasks.plan.models import TASKS, ConfigSource, read_config, task_of
from lora_ext.tasks.shared import provenance
from lora_ext.tasks.shared.run_directory import check_out, prepare_out
from lora_ext.tasks.shared.whole_files import write_json, write_whole

PLAN_FILE = "plan.json"
_OUTPUTS = ("plan.md", "plan.png", PLAN_FILE)
_TASKS = 100  # the paper's section 4.2 counts the disk for so many


@dataclass(frozen=True)
class PlanSettings:
    """What is planned.

    Attributes:
        finetune: the model, the method and its options, the batch; ``max_length`` is the tokens a text.
        task: one of ``TASKS``; None: what the config says.
        num_labels: that a classifier tells apart; None: what the config says, which is 2 where it says nothing.
        attention: transformers' name of the implementation; None: what it takes by itself.
        dtype, optimizer, gradient_checkpointing: as of :class:`lora_ext.planner.Setup`.
        accumulation_steps: batches whose gradients are added up.
        device: whose kernels it runs on, ``"cuda"`` or ``"cpu"``.
        gpu_memory: bytes of a device; None: nothing is said about fitting.
        reserve: bytes of these that are not for tensors: context, libraries' workspaces, what an allocator cannot use.
        disk: bytes for checkpoints; None: nothing is said about them.
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

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in TASKS:
            raise TaskError(f"--task is {self.task!r}, want one of {', '.join(TASKS)}")
        if self.num_labels is not None and self.num_labels < 1:
            raise TaskError(f"--num-labels is {self.num_labels}, want at least 1")
        if self.accumulation_steps < 1:
            raise TaskError(f"--accumulation-steps is {self.accumulation_steps}, want at least 1")
        if self.gpu_memory is not None and self.reserve >= self.gpu_memory:
            raise TaskError(f"--reserve takes all of --gpu-memory: {self.reserve:,} of {self.gpu_memory:,} bytes")

    @property
    def setup(self) -> Setup:
        """TaskError: a name is not known."""
        try:
            return Setup(
                self.finetune.batch_size,
                self.finetune.max_length,
                self.dtype,
                self.optimizer,
                self.gradient_checkpointing,
                self.accumulation_steps > 1,
            )
        except ValueError as error:
            raise TaskError(f"plan: {error}") from error


def plan(
    settings: PlanSettings, out: Path | None = None, *, overwrite: bool = False, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Counts the memory and disk of a method, of full fine-tuning and of inference; ``out`` gets them in three files.

    The paper's figures for GPT-3 175B follow from ``model="gpt3-175b"``, ``dtype="float16"`` and query and value. Its
    350 GB of memory for LoRA are the float16 weights. How it counts the 1.2 TB of full fine-tuning it does not say:
    weights and Adam's moments in float16 are 6 bytes a parameter, 1.05 TB, of which LoRA saves the "up to 2/3" of
    section 4.2; with gradients, which are there as well, they are 8, 1.40e12 bytes or 1.27 TiB. Its 35 MB for a
    checkpoint of rank 4 are 18.9 million float16 numbers, 37.7e6 bytes or 36 MiB.

    Returns:
        The content of plan.json.

    Raises:
        TaskError: a mistake in the settings, the config or the directory. Nothing is written then.
    """
    transformers.logging.set_verbosity_error()
    if out is not None:
        check_out(out, False, overwrite, marker=PLAN_FILE, what="a plan")
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
            say(f"{out / 'plan.png'} is left out, as it takes matplotlib: {install_hint('analyze')}")
        else:
            results.plot(out / "plan.png", result)
    return result


def _count(settings: PlanSettings, config: PretrainedConfig, setup: Setup) -> dict[str, Any]:
    task, method = settings.task or task_of(config), settings.finetune.method

    def planner(name: str | None) -> Planner:
        own = settings.finetune.with_method(name or "full")
        adapting = (lambda model: method_for(model, own, settings.finetune.model)) if name else None
        return Planner(ConfigSource(config, task, settings.attention, adapting), settings.device)

    # Full fine-tuning cannot train quantised weights; it is planned with what those compute in.
    setups = {"full": replace(setup, dtype=WEIGHT_DTYPES[setup.dtype].compute_name), method: setup}
    planners, frozen = {name: planner(name) for name in setups}, planner(None)
    try:
        _check_length(planners[method], setup)
        runs = {name: _run(planners[name], own) for name, own in setups.items()}
        inference = frozen.inference(setup)
        capacity = _capacity(settings, planners[method], runs)
    except (ValueError, TypeError) as error:
        raise TaskError(f"--method {method}: {error}") from error
    except AttributeError as error:  # transformers reads a field
        raise TaskError(f"--model: the config of this {config.model_type} says too little: {error}") from error
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise TaskError(
            f"--model: {config.model_type} cannot run without data, which planning has none of: {reason}"
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


def _capacity(settings: PlanSettings, planner: Planner, runs: Mapping[str, Any]) -> dict[str, Any] | None:
    if settings.gpu_memory is None:
        return None
    usable = settings.gpu_memory - settings.reserve
    fits = {name: run["peak"] <= usable for name, run in runs.items()}
    changes = [] if fits[settings.finetune.method] else changes_that_fit(planner, settings.setup, usable)
    return {"usable": usable, "fits": fits, "changes": [_change(change) for change in changes]}


def _change(change: Change) -> dict[str, Any]:
    return {"what": change.what, "devices": change.devices, "setup": asdict(change.setup), **_memory(change.memory)}


def _disk(disk: int | None, base: int, runs: Mapping[str, Any]) -> dict[str, Any]:
    """What checkpoints take: of full fine-tuning by themselves, of the others beside the base model."""
    beside = {name: 0 if name == "full" else base for name in runs}
    return {
        "base_bytes": base,
        "tasks": _TASKS,
        "tasks_bytes": {name: beside[name] + _TASKS * run["checkpoint_bytes"] for name, run in runs.items()},
        "tasks_16_bit_bytes": {
            name: beside[name] + _TASKS * run["checkpoint_16_bit_bytes"] for name, run in runs.items()
        },
        "checkpoints": disk
        and {name: max(disk - beside[name], 0) // run["checkpoint_bytes"] for name, run in runs.items()},
    }
