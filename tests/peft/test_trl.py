"""TRL's trainers: SFT takes an injected model as it is; others take PEFT's model on our kernels."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.models import answer, token_ids
from support.optional import datasets, trl
from support.tiny_trl import PREFERENCES, TARGETS, WORDS, decoder, save, settings, tokenizer
from torch import nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import lora_modules, unload
from lora_ext.integrations.peft import accelerate, report

# TRL and torchao, which it imports, warn a lot. TRL puts models on the GPU by itself.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]

TEXTS = [{"text": row["prompt"] + row["chosen"]} for row in PREFERENCES]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PREFERENCES)
]
ROWS = {"SFT": TEXTS, "DPO": PREFERENCES, "KTO": LABELLED}
SAMPLED = {"num_generations": 2, "max_completion_length": 4, "beta": 0.5}  # the methods that generate


def trainer_of(kind: str, model: nn.Module, directory: Path, **more):
    options = {}
    if kind in ("GRPO", "RLOO"):
        more = SAMPLED | more
        options = {"reward_funcs": lambda completions, **columns: [float(i % 2) for i, _ in enumerate(completions)]}
    rows = ROWS.get(kind, [{"prompt": row["prompt"]} for row in PREFERENCES])
    return getattr(trl, f"{kind}Trainer")(
        model=model,
        args=settings(kind, directory, **more),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        **options,
    )


def logged(trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.fixture
def base(tmp_path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(save(decoder(), tmp_path / "base"))


def of_peft(base: nn.Module, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    config = peft.LoraConfig(**{"r": 4, "target_modules": TARGETS, "init_lora_weights": False} | options)
    return peft.get_peft_model(copy.deepcopy(base), config)


# --- PEFT's model on our kernels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "is_alora"), [("SFT", True), ("DPO", True), ("DPO", False), ("GRPO", False)])
def test_losses_are_those_of_peft(kind, is_alora, base, tmp_path):
    """An invocation of aLoRA is the last word of each prompt."""
    (last,) = {tokenizer()(row["prompt"].strip())["input_ids"][-1] for row in PREFERENCES}
    more = {"alora_invocation_tokens": [last], "task_type": "CAUSAL_LM"} if is_alora else {}
    losses, logits = [], []
    for accelerated in (False, True):
        model = of_peft(base, **more)
        if accelerated:
            accelerate(model)
            assert all(layer.accelerated for layer in report(model))
        torch.manual_seed(1)
        trainer = trainer_of(kind, model, tmp_path, max_steps=3, seed=3)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        logits.append(answer(model, token_ids() % len(WORDS)))
    assert losses[1] == pytest.approx(losses[0], abs=1e-4) and len(losses[1]) == 3
    assert abs(losses[1][2] - losses[1][0]) > 1e-3
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "key", "first"),
    [("DPO", "loss", math.log(2)), ("KTO", "rewards/chosen", 0.0), ("GRPO", "kl", 0.0), ("RLOO", "kl", 0.0)],
)
def test_the_reference_is_the_model_as_it_was(kind, key, first, base, tmp_path):
    """Its adapter is not zero: the base model as the reference would show."""
    model = accelerate(of_peft(base))
    trainer = trainer_of(kind, model, tmp_path)
    assert trainer.ref_model is None and "ref" in model.peft_config
    trainer.train()
    assert logged(trainer, key)[0] == pytest.approx(first, abs=1e-4)


# --- injected models --------------------------------------------------------------------------------------------------


def test_sft_takes_an_injected_model_as_it_is(base, tmp_path):
    model = inject(base, LoraConfig(r=4, target_modules=TARGETS))
    trainer = trainer_of("SFT", model, tmp_path, max_steps=4)
    trainer.train()
    assert trainer.model is model and logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    assert all(layer.adapters["default"].lora_B.abs().sum() > 0 for _, layer in lora_modules(model))


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO", "RLOO"])
def test_methods_with_a_reference_name_the_other_door(kind, base, tmp_path):
    """TRL would compare with the checkpoint, without the adapters, and load it next to the model."""
    model = inject(base, LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    with pytest.raises(RuntimeError, match=rf"trainer \(trl, {kind.lower()}\).*lora_ext.integrations.peft.accelerate"):
        trainer_of(kind, model, tmp_path)


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"])
def test_a_peft_config_is_refused_before_anything_changes(targets, tmp_path):
    """PEFT would train its own adapter on the base layers of ours, in a file that loads nowhere."""
    model = inject(decoder(), LoraConfig(r=2, target_modules=TARGETS))
    before = set(model.state_dict())
    with pytest.raises(ValueError, match=r"without peft_config; or .* lora_ext.integrations.peft.accelerate"):
        trl.SFTTrainer(
            model=model,
            args=settings("SFT", tmp_path),
            train_dataset=datasets.Dataset.from_list(TEXTS),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(target_modules=targets),
        )
    assert set(model.state_dict()) == before


def test_an_adapted_head_is_refused_because_trl_reads_its_weight(base, tmp_path):
    model = inject(base, LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(RuntimeError, match=r"'lm_head'.*modules_to_save"):
        trainer_of("SFT", model, tmp_path)


def test_the_guard_goes_with_the_last_adapter_and_survives_copies():
    model = inject(decoder(), LoraConfig(r=2, target_modules=TARGETS))
    model.add_model_tags(["mine"])
    twin = copy.deepcopy(model)
    assert vars(twin)["add_model_tags"].__self__ is twin
    assert pickle.loads(pickle.dumps(model)).model_tags == ["mine"]
    assert "add_model_tags" not in vars(unload(model))
