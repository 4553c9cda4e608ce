"""Batches whose rows name adapters train each adapter as batches of its own rows do."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import torch.distributed._composable.checkpoint_activation
from support.models import Net, bert, llama, token_ids
from support.rows import RANKS, gradients, with_adapters
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from lora_ext import LoraConfig, inject, set_adapter
from lora_ext.nn.rows import in_force

NAMES = ["b", "__base__", "a", "b", "c"]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_equals_separate_runs(dropout, checkpointing):
    # Layers without the adapter draw no seed, so masks are the same only if all adapters have the same layers.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    model = with_adapters(llama(), targets, same=dropout > 0, lora_dropout=dropout)
    ids, names = token_ids(5), ["b", "c", "a", "b", "__base__"]
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    set_adapter(model, ["a", "b", "c"])

    def losses(**names) -> Tensor:
        torch.manual_seed(7)
        logits = model(ids, use_cache=False, **names).logits[:, :-1]
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1)

    together = losses(adapter_names=names)
    grads = gradients(model, together.sum())
    seen = set()
    for name in RANKS:
        set_adapter(model, name)
        rows = torch.tensor([name == chosen for chosen in names])
        separate = losses()
        torch.testing.assert_close(together[rows], separate[rows])
        expected = gradients(model, separate[rows].sum())
        for parameter, grad in expected.items():
            torch.testing.assert_close(grads[parameter], grad, rtol=1e-4, atol=1e-6)
        seen |= expected.keys()
    assert grads.keys() == seen


def test_adapters_with_heads_of_their_own_train_together():
    """They cannot be active together."""
    model, ids, names = with_adapters(bert(), ["query"], modules_to_save=["classifier"]), token_ids(4), list("abca")
    with pytest.raises(ValueError, match=r"use only one of them. To train both in one batch .*requires_grad_\(\)"):
        set_adapter(model, ["a", "b"])
    expected = {}
    for name in RANKS:
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        expected |= gradients(model, set_adapter(model, name)(ids[rows]).logits.square().sum())
    set_adapter(model, "a")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapters." in name)
    grads = gradients(model, model(ids, adapter_names=names).logits.square().sum())
    assert {f"classifier.adapters.{name}.weight" for name in RANKS} <= grads.keys()
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_a_head_in_full_and_factors_of_the_same_head_train_together():
    model, ids, names = bert(), token_ids(4), list("abca")
    inject(model, LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]), "a")
    inject(model, LoraConfig(r=2, target_modules=["query", "classifier"], init_lora_weights=False), "b")
    inject(model, LoraConfig(r=2, target_modules=["classifier"], init_lora_weights=False), "c")
    expected = {}
    for name in RANKS:
        rows = [i for i, chosen in enumerate(names) if chosen == name]
        expected |= gradients(model, set_adapter(model.eval(), name)(ids[rows]).logits.square().sum())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapters." in name)
    grads = gradients(model, model(ids, adapter_names=names).logits.square().sum())
    assert "classifier.base_layer.adapters.b.lora_A" in grads and "classifier.adapters.a.weight" in grads
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


def test_two_batches_before_their_backwards():
    model, ids = with_adapters(llama(), ["q_proj", "down_proj"]), token_ids(4)
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    set_adapter(model, ["a", "b", "c"])
    batches = [["a", "b", "c", "a"], ["c", "c", "a", "__base__"]]
    expected = [gradients(model, model(ids, labels=ids, adapter_names=names).loss) for names in batches]
    losses = [model(ids, labels=ids, adapter_names=names).loss for names in batches]
    for loss, grads in reversed(list(zip(losses, expected, strict=True))):
        found = gradients(model, loss)
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(found[name], grad)


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return gradients(model, model(x, adapter_names=NAMES).square().sum())


def composable(module: nn.Module) -> nn.Module:
    """Checkpoints a module by hooks, which leave no function of PyTorch on the stack."""
    return torch.distributed._composable.checkpoint_activation.checkpoint(module)


def test_a_checkpoint_of_hooks():
    model, x = with_adapters(Net(), ["up", "head"]).train(), torch.randn(5, 6, requires_grad=True)
    set_adapter(model, ["a", "b", "c"])
    expected = step(model, x)
    composable(model.blocks[0])
    composable(model.blocks[1])
    torch.testing.assert_close(step(model, x), expected)


def test_a_checkpoint_that_is_not_known_is_refused(monkeypatch):
    """It would run its layers again with other adapters."""
    model, x = with_adapters(Net(), ["up", "head"]).train(), torch.randn(5, 6, requires_grad=True)
    set_adapter(model, ["a", "b", "c"])
    composable(model.blocks[0])
    monkeypatch.setattr(in_force, "frame_of_hook", lambda hook: None)
    with pytest.raises(RuntimeError, match=f"checkpointing of PyTorch {re.escape(torch.__version__)} is not known"):
        step(model, x)


def test_a_checkpoint_of_two_models():
    one, two = (with_adapters(Net(), ["up", "head"]).train() for _ in range(2))
    for model in (one, two):
        set_adapter(model, ["a", "b", "c"])
        model.norm = nn.Identity()
    head, x = nn.Linear(3, 6), torch.randn(5, 6, requires_grad=True)

    def both(x: Tensor) -> Tensor:
        return two(head(one(x, adapter_names=NAMES)), adapter_names=NAMES[::-1]).square().sum()

    both(x).backward()
    expected = [
        p.grad.clone() for p in (*one.parameters(), *two.parameters()) if p.requires_grad and p.grad is not None
    ]
    for reentrant in (True, False):
        one.zero_grad(), two.zero_grad()
        torch.utils.checkpoint.checkpoint(both, x, use_reentrant=reentrant).backward()
        grads = [p.grad for p in (*one.parameters(), *two.parameters()) if p.requires_grad and p.grad is not None]
        torch.testing.assert_close(grads, expected)


class Named(torch.utils.data.Dataset):
    """Examples with the name of the adapter that they train."""

    def __init__(self) -> None:
        self.ids = token_ids(12)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, object]:
        return {"input_ids": self.ids[i], "labels": self.ids[i], "adapter_names": "abc"[i % 3]}


def test_a_trainer_trains_several_adapters_at_once(tmp_path):
    model, data = with_adapters(llama(), ["q_proj", "down_proj"], same=True), Named()
    set_adapter(model, ["a", "b", "c"])
    copied = copy.deepcopy(model)
    options = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=6, max_steps=2, remove_unused_columns=False, **options
    )

    def collate(rows: list[dict]) -> dict[str, object]:
        names = [row["adapter_names"] for row in rows]
        tensors = {key: torch.stack([row[key] for row in rows]) for key in ("input_ids", "labels")}
        return tensors | {"adapter_names": names}

    Trainer(model, arguments, train_dataset=data, data_collator=collate).train()
    before, after = (dict(m.named_parameters()) for m in (copied, model))
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {name for name in after if ".adapters." in name}
