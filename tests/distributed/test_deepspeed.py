"""The real DeepSpeed on the CPU: its engine and Transformers' Trainer train adapters as one process does."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.models import VOCABULARY, llama, token_ids
from support.ranks import Ranks, loss_of, trained
from torch import nn
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from transformers.integrations import HfDeepSpeedConfig

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, set_adapter
from lora_ext.integrations.peft import accelerate

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before it is imported
from support.optional import deepspeed

pytestmark = [pytest.mark.cpu_only("processes with gloo"), pytest.mark.slow]

LORA = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj", "embed_tokens"]}
STEPS = 3


def settings(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 0,  # parameters of fewer elements stay whole
            "stage3_gather_16bit_weights_on_model_save": True,  # without it, Trainer saves the engine's parts alone
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.fixture
def ranks():
    """Processes of the test's own: DeepSpeed keeps their group for good."""
    ranks = Ranks()
    yield ranks
    ranks.stop()


def injected(base: nn.Module) -> nn.Module:
    """Also adapts a parameter of a layer whose function DeepSpeed replaces by one that saves tensors."""
    inject(base, LoraConfig(**LORA), "other")
    return inject(base, LoraConfig(**LORA, target_parameters=["gate_proj.weight"]))


def of_peft(base: nn.Module) -> nn.Module:
    return accelerate(peft.get_peft_model(base, peft.LoraConfig(**LORA)))


WAYS = {"inject": injected, "peft": of_peft}


def join(rank: int) -> None:
    """Sets what a launcher would, and makes the process group DeepSpeed's, too."""
    number = str(torch.distributed.get_world_size())
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    deepspeed.init_distributed("gloo")


def _train(rank: int, way: str, stage: int, partitioned: bool, directory: Path) -> None:
    join(rank)
    alone = WAYS[way](LlamaForCausalLM.from_pretrained(directory / "base"))
    torch.manual_seed(1)
    kept = HfDeepSpeedConfig(settings(stage)) if partitioned else None  # from_pretrained asks for it while it lives
    model = WAYS[way](LlamaForCausalLM.from_pretrained(directory / "base"))
    del kept
    factors = [[p for name, p in one.named_parameters() if "lora_" in name] for one in (model, alone)]
    random = torch.Generator().manual_seed(3)
    with torch.no_grad(), deepspeed.zero.GatheredParameters(factors[0], modifier_rank=0):
        for parameter, other in zip(*factors, strict=True):
            parameter.copy_(other.normal_(std=0.1, generator=random))
    optimizers = [torch.optim.SGD(trained(one).values(), lr=0.5) for one in (model, alone)]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizers[0], config=settings(stage))
    batches = torch.randint(VOCABULARY, (STEPS, 2, 2, 7), generator=torch.Generator().manual_seed(2))
    for batch in batches:
        for name in ("other", "default") if way == "inject" else ():
            for one in (model, alone):
                set_adapter(one, name)
            torch.testing.assert_close(loss_of(engine, batch[rank]), loss_of(alone, batch[rank]))
        loss = loss_of(engine, batch[rank])
        engine.backward(loss)
        engine.step()
        losses = [loss_of(alone, ids) for ids in batch]
        torch.testing.assert_close(loss.detach(), losses[rank].detach())
        optimizers[1].zero_grad()
        (sum(losses) / 2).backward()
        optimizers[1].step()
    if way == "inject":
        save_adapter(model, directory / "together")
        if rank == 0:
            save_adapter(alone, directory / "alone")
        if stage == 3:
            for change in (merge, lambda model: load_adapter(model, directory / "together")):
                with pytest.raises(ValueError, match="DeepSpeed's ZeRO-3 has partitioned"):
                    change(model)
    torch.distributed.barrier()


@pytest.mark.parametrize(
    ("way", "stage", "partitioned"),
    [("inject", 1, False), ("inject", 2, False), ("inject", 3, False), ("inject", 3, True), ("peft", 3, False)],
)
def test_an_engine_trains_as_one_process_does(way, stage, partitioned, tmp_path, ranks):
    llama().save_pretrained(tmp_path / "base")
    ranks(2, _train, way, stage, partitioned, tmp_path)
    if way == "inject":
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        ids = token_ids()
        together, alone = (load_adapter(copy.deepcopy(base), tmp_path / name) for name in ("together", "alone"))
        torch.testing.assert_close(together(ids).logits, alone(ids).logits)
        assert not torch.allclose(together(ids).logits, base(ids).logits)


def _run_trainer(rank: int, stage: int, directory: Path) -> None:
    join(rank)
    ids = torch.randint(VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(2)).tolist()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    config = settings(stage) | {"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}, "gradient_clipping": "auto"}
    options = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    options |= {
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        "deepspeed": config,
    }

    def train(name: str, steps: int, resume: bool) -> nn.Module:
        arguments = TrainingArguments(str(directory / name), max_steps=steps, **options)
        torch.manual_seed(1)
        model = injected(LlamaForCausalLM.from_pretrained(directory / "base"))
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return model

    save_adapter(train("whole", 2, False), directory / "uninterrupted")
    train("parts", 1, False)
    save_adapter(train("parts", 2, True), directory / "resumed")


@pytest.mark.parametrize("stage", [2, 3])
def test_a_resumed_run_of_trainer_ends_as_an_uninterrupted_one(stage, tmp_path, ranks):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    ranks(2, _run_trainer, stage, tmp_path)
    ids = token_ids()
    expected = load_adapter(copy.deepcopy(base), tmp_path / "uninterrupted")(ids).logits
    assert not torch.allclose(expected, base(ids).logits)
    for name in ("resumed", "whole/checkpoint-2", "parts/checkpoint-2"):
        torch.testing.assert_close(load_adapter(copy.deepcopy(base), tmp_path / name)(ids).logits, expected)
