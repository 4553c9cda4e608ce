"""Batches whose rows name adapters train each adapter as batches of its own rows do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed._composable.checkpoint_activation
from support.models import Block, bert, llama, token_ids
from support.rows import RANKS, gradients, with_adapters
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_ext import LoraConfig, inject, set_adapter

NAMES = ["b", "__base__", "a", "b", "c"]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_equals_separate_runs(dropout, checkpointing):
    # Layers without the adapter draw no seed, so masks are the same only if all adapters have the same layers.
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    model = with_adapters(llama(), targets, same=dropout > 0, lora_dropout=dropout)
    ids, names = token_ids(5), ["b", "c", "a", "b", "__base__"]
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
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


IN_FULL = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
HEADS = {
    "each in full": ([IN_FULL] * 3, "classifier.adapters.{}.weight", "abc"),
    "in full and by factors": (
        [IN_FULL, {"target_modules": ["query", "classifier"]}, {"target_modules": ["classifier"]}],
        "classifier.base_layer.adapters.{}.lora_A",
        "bc",
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_adapters_that_share_a_head_train_together(kind):
    """Those that train it in full cannot be active together."""
    (configs, path, in_it), model, ids, names = HEADS[kind], bert().eval(), token_ids(4), list("abca")
    for name, options in zip(RANKS, configs, strict=True):
        inject(model, LoraConfig(r=2, init_lora_weights=False, **options), name)
    if kind == "each in full":
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
    assert {path.format(name) for name in in_it} | {"classifier.adapters.a.weight"} <= grads.keys()
    torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-6)


# --- activation checkpointing ----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Blocks that are checkpointed in one of PyTorch's ways, or not (``how`` is None)."""

    def __init__(self, how: str | None = None) -> None:
        super().__init__()
        self.blocks, self.head, self.how = nn.ModuleList([Block(), Block()]), nn.Linear(6, 3), how
        if how == "hooks":
            for block in self.blocks:
                torch.distributed._composable.checkpoint_activation.checkpoint(block)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.part(block, x)
        return self.head(x)

    def part(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.how in ("reentrant", "not reentrant"):
            return checkpoint(block, x, use_reentrant=self.how == "reentrant")
        if self.how in ("nested", "nested reentrant"):
            options = {"use_reentrant": self.how == "nested reentrant"}
            return checkpoint(lambda x: checkpoint(block, x, **options).sin(), x, **options)
        return block(x).sin() if self.how == "none nested" else block(x)


OTHER = ["c", "c", "a", "__base__", "b"]
X = torch.randn(5, 6, requires_grad=True)
CALLS: dict[str, Callable[[nn.Module], Tensor]] = {
    "one": lambda model: model(X, adapter_names=NAMES),
    "two": lambda model: model(X, adapter_names=NAMES) + 2 * model(X, adapter_names=OTHER),
    "plain before": lambda model: 2 * model(X) + model(X, adapter_names=NAMES),
    "plain after": lambda model: model(X, adapter_names=NAMES) + 2 * model(X),
    "chained": lambda model: model(model(X, adapter_names=NAMES).repeat(1, 2), adapter_names=OTHER),
    "eval between": lambda model: [model(X, adapter_names=NAMES), other_calls(model)][0],
}


def other_calls(model: nn.Module) -> None:
    with torch.no_grad():
        model(X, adapter_names=OTHER)
    model(X, adapter_names=OTHER)


def checkpointed(how: str | None) -> nn.Module:
    torch.manual_seed(0)
    return set_adapter(with_adapters(Checkpointed(how), ["up", "down", "head"], same=True).train(), ["a", "b", "c"])


def grads_of(how: str | None, call: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    model = checkpointed(how)
    return gradients(model, call(model).square().sum())


@pytest.mark.parametrize("how", ["not reentrant", "hooks"])
@pytest.mark.parametrize("call", CALLS)
def test_gradients_are_those_without_checkpoints(call, how):
    """A backward runs layers again, of one call or of several, whichever adapters are active then."""
    grads = grads_of(how, CALLS[call])
    assert len(grads) > 10
    torch.testing.assert_close(grads, grads_of(None, CALLS[call]))


def test_nested_checkpoints():
    expected = grads_of("none nested", CALLS["two"])
    torch.testing.assert_close(grads_of("nested", CALLS["two"]), expected)


@pytest.mark.parametrize("how", ["reentrant", "nested reentrant"])
def test_reentrant_checkpoints_are_refused(how):
    """Their backward makes nodes that belong to no call."""
    with pytest.raises(RuntimeError, match="which call it belongs to cannot be told.*use_reentrant=False"):
        grads_of(how, CALLS["two"])
    plain = "none nested" if how == "nested reentrant" else None
    torch.testing.assert_close(grads_of(how, lambda model: model(X)), grads_of(plain, lambda model: model(X)))


def test_backwards_in_any_order_and_twice():
    model, plain = checkpointed("not reentrant"), checkpointed(None)
    for order in ([0, 1], [1, 0]):
        losses = [[m(X, adapter_names=names).square().sum() for names in (NAMES, OTHER)] for m in (model, plain)]
        for i in order:
            torch.testing.assert_close(gradients(model, losses[0][i]), gradients(plain, losses[1][i]))
    loss = model(X, adapter_names=NAMES).square().sum()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(gradients(model, loss), gradients(plain, plain(X, adapter_names=NAMES).square().sum()))
    assert len(model._lora_adapters.active.pending) == 3  # two of losses
    del loss, losses
    assert not model._lora_adapters.active.pending


def test_a_backward_from_something_that_the_model_did_not_return():
    model, plain, kept = checkpointed("not reentrant"), checkpointed(None), []
    for each in (model, plain):
        each.head.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    ys = model(X, adapter_names=NAMES), plain(X, adapter_names=NAMES)  # their graphs keep the names
    grads = [gradients(each, x.square().sum()) for each, x in zip((model, plain), kept, strict=True)]
    torch.testing.assert_close(*grads)
    del ys


def test_threads_that_train_one_model_are_refused():
    """The numbers of their autograd nodes overlap."""
    model, batches = checkpointed("not reentrant"), [NAMES, OTHER]
    meet = threading.Barrier(2)

    def loss(names: list[str]) -> Tensor:
        meet.wait(20)  # two threads
        return model(X, adapter_names=names).square().sum()

    with ThreadPoolExecutor(len(batches)) as pool:
        losses = list(pool.map(loss, batches))
    with pytest.raises(RuntimeError, match="which call it belongs to cannot be told.*in one thread at a time"):
        for one in losses:
            one.backward()
