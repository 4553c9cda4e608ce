"""TRL's trainers: losses are those with PEFT, also on aLoRA."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.models import answer, token_ids
from support.optional import datasets, trl
from support.tiny_trl import PREFERENCES, TARGETS, WORDS, decoder, settings, tokenizer
from torch import nn

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.integrations.trl import for_trl

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]


def pair(directory, is_alora: bool) -> dict[str, nn.Module]:
    """The same adapted model, PEFT's and ours. An invocation is the last word of each prompt."""
    base, words = decoder(), tokenizer()
    base.save_pretrained(directory / "base")
    (last,) = {words(row["prompt"].strip())["input_ids"][-1] for row in PREFERENCES}
    more = {"alora_invocation_tokens": [last], "task_type": "CAUSAL_LM"} if is_alora else {}
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **more)
    model = inject(copy.deepcopy(base), config)
    save_adapter(model, directory / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), directory / "adapter", is_trainable=True)
    return {"theirs": theirs, "ours": for_trl(model)}


@pytest.mark.parametrize(("kind", "is_alora"), [("SFT", True), ("DPO", True), ("DPO", False)])
def test_losses_are_those_with_peft(kind, is_alora, tmp_path):
    rows = [{"text": row["prompt"] + row["chosen"]} for row in PREFERENCES] if kind == "SFT" else PREFERENCES
    losses, logits, ids = {}, {}, token_ids() % len(WORDS)
    for name, model in pair(tmp_path, is_alora).items():
        args = settings(kind, tmp_path / name, max_steps=3, seed=3)
        data = datasets.Dataset.from_list(rows)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, args=args, train_dataset=data, processing_class=tokenizer()
        )
        trainer.train()
        losses[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        logits[name] = answer(model, ids)
    assert losses["ours"] == pytest.approx(losses["theirs"], abs=1e-4) and len(losses["ours"]) == 3
    assert abs(losses["ours"][2] - losses["ours"][0]) > 1e-3
    torch.testing.assert_close(logits["ours"], logits["theirs"], rtol=1e-3, atol=1e-4)
