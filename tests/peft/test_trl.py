"""TRL's trainers on an injected model: the reference is the model with the adapter as it was, no other checkpoint."""

from __future__ import annotations

import copy
import gc
import math
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from support.models import token_ids
from support.optional import datasets, trl
from support.tiny_trl import PREFERENCES, TARGETS, WORDS, decoder, save, settings, tokenizer
from torch import Tensor, nn

from lora_ext import LoraConfig, inject, load_adapter, merge, save_adapter, unmerge
from lora_ext.adapters import adapter_names, disable_adapters, lora_modules, merge_and_unload, rename_adapter
from lora_ext.integrations.trl import for_trl

# TRL and torchao, which it imports, warn a lot. TRL puts models on the GPU by itself.
pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore"), pytest.mark.cpu_only("TRL chooses the device")]


@pytest.fixture(params=["Llama", "Qwen2"])
def checkpoint(request, tmp_path) -> Path:
    return save(decoder(request.param), tmp_path / "base")


def base_of(checkpoint: Path) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(checkpoint)


def sft(model: nn.Module, directory: Path) -> nn.Module:
    """Trains one step, large enough to change the outputs."""
    texts = datasets.Dataset.from_list([{"text": row["prompt"] + row["chosen"]} for row in PREFERENCES])
    trainer = trl.SFTTrainer(
        model=model, args=settings("SFT", directory), train_dataset=texts, processing_class=tokenizer()
    )
    trainer.train()
    return model


def injected(checkpoint: Path, directory: Path) -> nn.Module:
    """An injected model after a step of SFT: its adapter is not zero."""
    model = inject(base_of(checkpoint), LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    return sft(model, directory / "sft")


def dpo(model: nn.Module, directory: Path, **more):
    args = settings("DPO", directory, beta=0.5, **more)
    data = datasets.Dataset.from_list(PREFERENCES)
    return trl.DPOTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer())


def reward(completions, **kwargs) -> list[float]:
    return [float(i % 2) for i, _ in enumerate(completions)]


def grpo(model: nn.Module, directory: Path, kind: str = "GRPO", **more):
    sizes = {"num_generations": 2, "max_completion_length": 4, "beta": 0.5}
    args = settings(kind, directory, **sizes | more)
    data = datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES])
    trainer = getattr(trl, f"{kind}Trainer")
    return trainer(model=model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer())


def logged(trainer, key: str) -> float:
    return next(entry[key] for entry in trainer.state.log_history if key in entry)


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids % len(WORDS)).logits


def models_in_memory() -> int:
    """The number of base models that are alive, by their embeddings."""
    gc.collect()
    return sum(isinstance(thing, nn.Embedding) for thing in gc.get_objects())


def test_dpo_after_sft_begins_at_ln_2_without_a_second_model(checkpoint, tmp_path):
    model = injected(checkpoint, tmp_path)
    ids = token_ids()
    trained = logits(model, ids)
    assert not torch.allclose(trained, logits(base_of(checkpoint), ids), atol=1e-3)  # the step was large enough
    before = models_in_memory()
    trainer = dpo(for_trl(model), tmp_path)
    assert trainer.ref_model is None and models_in_memory() == before
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(math.log(2), abs=1e-4)
    assert models_in_memory() == before
    assert not torch.allclose(logits(model, ids), trained)
    with trl.trainer.utils.use_adapter(trainer.model, "ref"):
        torch.testing.assert_close(logits(trainer.model, ids), trained)  # the reference has not moved
    with trainer.model.disable_adapter():
        torch.testing.assert_close(logits(trainer.model, ids), logits(base_of(checkpoint), ids))


def test_trl_turns_the_dropout_of_adapters_off(tmp_path):
    """DPO, KTO and reward models train without dropout unless told otherwise (``disable_dropout``)."""
    base = base_of(save(decoder("Llama"), tmp_path / "base"))
    model = inject(base, LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.5, init_lora_weights=False))
    trainer = dpo(for_trl(model), tmp_path)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(math.log(2), abs=1e-4)
    layers = [layer for _, layer in lora_modules(model)]
    assert layers and all(adapter.lora_dropout == 0 for layer in layers for adapter in layer.adapters.values())
    assert trainer.model.peft_config["default"].lora_dropout == 0.5  # as configured, like PEFT's


def test_the_reference_equals_the_merged_model(checkpoint, tmp_path):
    model = injected(checkpoint, tmp_path)
    ids, merged = token_ids(), merge_and_unload(copy.deepcopy(model))
    trainer = dpo(for_trl(model), tmp_path)
    with trl.trainer.utils.use_adapter(trainer.model, "ref"):
        torch.testing.assert_close(logits(trainer.model, ids), logits(merged, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_first_kl_of_online_methods_is_zero(kind, tmp_path):
    decoder().save_pretrained(tmp_path / "base")
    model = injected(tmp_path / "base", tmp_path)
    before = models_in_memory()
    trainer = grpo(for_trl(model), tmp_path, kind, max_steps=2)
    assert trainer.ref_model is None and models_in_memory() == before
    trainer.train()
    kls = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert kls[0] == pytest.approx(0, abs=1e-6)
    assert abs(kls[1]) > 1e-6


def test_the_first_kto_rewards_are_zero(tmp_path):
    decoder().save_pretrained(tmp_path / "base")
    model = injected(tmp_path / "base", tmp_path)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(PREFERENCES)
    ]
    trainer = trl.KTOTrainer(
        model=for_trl(model),
        args=settings("KTO", tmp_path, beta=0.5),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
    )
    assert trainer.ref_model is None
    trainer.train()
    assert logged(trainer, "rewards/chosen") == pytest.approx(0, abs=1e-5)
    assert logged(trainer, "rewards/rejected") == pytest.approx(0, abs=1e-5)


def test_checkpoints_hold_adapters_and_resume_with_their_reference(tmp_path):
    base = decoder()
    base.save_pretrained(tmp_path / "base")
    model = injected(tmp_path / "base", tmp_path)
    save_adapter(model, tmp_path / "start")
    trainer = dpo(for_trl(model), tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    first = tmp_path / "run" / "checkpoint-1"
    files = {
        path.relative_to(first).as_posix()
        for path in first.rglob("*")
        if "adapter" in path.name or "model" in path.name
    }
    assert files == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ref/adapter_config.json",
        "ref/adapter_model.safetensors",
    }
    ids = token_ids()
    read = peft.PeftModel.from_pretrained(base_of(tmp_path / "base"), tmp_path / "run" / "checkpoint-2")
    torch.testing.assert_close(logits(read, ids), logits(model, ids))

    again = load_adapter(base_of(tmp_path / "base"), first, trainable=True)  # not the adapter that the run began with
    resumed = dpo(for_trl(again), tmp_path / "run", max_steps=2)
    resumed.train(resume_from_checkpoint=str(first))
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-4, atol=1e-5)
    reference = load_adapter(base_of(tmp_path / "base"), tmp_path / "start")
    with trl.trainer.utils.use_adapter(resumed.model, "ref"):
        torch.testing.assert_close(logits(resumed.model, ids), logits(reference, ids))


def test_rows_and_modules_trained_in_full_are_copied_too(tmp_path):
    config = LoraConfig(
        r=2,
        target_modules=TARGETS,
        modules_to_save=["lm_head"],
        trainable_token_indices=[3, 4],
        rank_pattern={"v_proj": 4},
        init_lora_weights=False,
    )
    decoder().save_pretrained(tmp_path / "base")
    model = sft(inject(base_of(tmp_path / "base"), config), tmp_path)
    trainer = dpo(for_trl(model), tmp_path)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(math.log(2), abs=1e-4)


# --- without our help -------------------------------------------------------------------------------------------------


def test_plain_trainers_that_need_no_reference_run(tmp_path):
    decoder().save_pretrained(tmp_path / "base")
    model = injected(tmp_path / "base", tmp_path)  # SFT is one
    grpo(model, tmp_path, beta=0.0).train()
    ours = base_of(tmp_path / "base")
    data = datasets.Dataset.from_list(PREFERENCES)
    args = settings("DPO", tmp_path)
    trl.DPOTrainer(model=model, ref_model=ours, args=args, train_dataset=data, processing_class=tokenizer())
    trainer = dpo(model, tmp_path, precompute_ref_log_probs=True)  # with the model itself, before it changes
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx(math.log(2), abs=1e-4)


def test_a_peft_config_is_refused_before_anything_changes(tmp_path):
    """PEFT would train its own adapter on the base layers of ours, in a file that loads nowhere."""
    model = inject(decoder(), LoraConfig(r=2, target_modules=TARGETS))
    before = set(model.state_dict())
    texts = datasets.Dataset.from_list([{"text": row["prompt"]} for row in PREFERENCES])
    for targets in (TARGETS, "all-linear"):
        with pytest.raises(ValueError, match=r"without peft_config; or .* lora_ext.integrations.peft.accelerate"):
            trl.SFTTrainer(
                model=model,
                args=settings("SFT", tmp_path),
                train_dataset=texts,
                processing_class=tokenizer(),
                peft_config=peft.LoraConfig(target_modules=targets),
            )
        assert set(model.state_dict()) == before


def test_an_adapted_head_is_refused_because_trl_reads_its_weight(tmp_path):
    decoder().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"'lm_head'.*modules_to_save"):
        for_trl(inject(base_of(tmp_path / "base"), config))


# --- for_trl ----------------------------------------------------------------------------------------------------------


def test_for_trl_refuses_models_that_it_cannot_serve():
    with pytest.raises(ValueError, match="for_trl: LlamaForCausalLM is not injected"):
        for_trl(decoder())
    model = inject(decoder(), LoraConfig(r=2, target_modules=TARGETS), "mine")
    with pytest.raises(ValueError, match=r"'mine'.*'default'.*rename_adapter"):
        for_trl(model)
    rename_adapter(model, "mine", "default")
    merge(model)
    with pytest.raises(RuntimeError, match=r"merged.*unmerge"):
        for_trl(model)
    unmerge(model)
    for_trl(model)
    with pytest.raises(ValueError, match="PeftModel"):
        for_trl(peft.get_peft_model(decoder(), peft.LoraConfig(target_modules=TARGETS)))


def test_the_wrapper_has_pefts_interface(tmp_path):
    model = inject(decoder(), LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    wrapped, ids = for_trl(model), token_ids()
    expected = logits(model, ids)
    assert isinstance(wrapped, peft.PeftModel) and wrapped.get_base_model() is model
    torch.testing.assert_close(logits(wrapped, ids), expected)
    assert wrapped.generate(input_ids=ids % len(WORDS), max_new_tokens=2).shape == (2, 9)
    assert wrapped.active_adapter == "default" and wrapped.active_adapters == ["default"]
    assert wrapped.peft_config["default"].r == 2
    wrapped.add_adapter("other", wrapped.peft_config["default"])
    assert wrapped.active_adapter == "default" and adapter_names(model) == ["default", "other"]
    torch.testing.assert_close(logits(wrapped, ids), expected)
    wrapped.set_adapter("other")
    assert wrapped.active_adapter == "other"
    with pytest.raises(ValueError, match="nothing"):
        wrapped.set_adapter("nothing")
    wrapped.set_adapter("default")
    wrapped.delete_adapter("other")
    assert list(wrapped.peft_config) == ["default"]
    with wrapped.disable_adapter(), disable_adapters(model):
        assert not torch.allclose(logits(wrapped, ids), expected)
    wrapped.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    wrapped.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(wrapped, ids), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert wrapped.get_nb_trainable_parameters()[0] == sum(p.numel() for p in model.parameters() if p.requires_grad)
