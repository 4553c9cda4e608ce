"""Makes small models and checks whether one was changed, for the tests of injection, adapters and files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.merging import same_bits
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lora_ext import LoraConfig, inject, save_adapter
from lora_ext.adapters import lora_modules

_ENCODER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
VOCABULARY = 50


def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=VOCABULARY, num_labels=3, max_position_embeddings=32, **_ENCODER, **_NO_DROPOUT)
    )


def roberta() -> RobertaForSequenceClassification:
    return RobertaForSequenceClassification(
        RobertaConfig(vocab_size=VOCABULARY, num_labels=3, max_position_embeddings=32, **_ENCODER, **_NO_DROPOUT)
    )


def llama(tied: bool = False) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=32,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
            **_ENCODER,
        )
    )


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=1, n_head=2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """A model that no library knows: two blocks, a norm with buffers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def shaken(model: nn.Module, by: float = 0.1) -> nn.Module:
    """Adds noise to the trainable parameters, in place of training. Returns ``model``."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=by)
    return model


def token_ids(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(VOCABULARY, (rows, length))


IDS = torch.arange(7)[None]


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


@torch.no_grad()
def answer(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    """The logits of a model in eval mode."""
    return model.eval()(input_ids=ids).logits


def snapshot(subject: nn.Module | Path) -> dict[str, Any]:
    """Records everything that a refused operation must not change.

    For a model: its modules, flags, values, merged adapters and names of attributes. For a directory: the files below
    it, and the unfinished directories that a save has left.
    """
    if isinstance(subject, Path):
        paths = [path for path in subject.rglob("*") if path.is_file() or path.suffix == ".unfinished"]
        return {str(path.relative_to(subject)): path.read_bytes() if path.is_file() else b"" for path in paths}
    model = subject
    return {
        "modules": {path: id(module) for path, module in model.named_modules(remove_duplicate=False)},
        "training": {path: module.training for path, module in model.named_modules()},
        "requires_grad": {path: p.requires_grad for path, p in model.named_parameters(remove_duplicate=False)},
        "parameters": {path: id(p) for path, p in model.named_parameters(remove_duplicate=False)},
        "values": {path: tensor.clone() for path, tensor in model.state_dict().items()},
        "merged": {path: layer.merged_adapters for path, layer in lora_modules(model)},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
    }


def assert_unchanged(subject: nn.Module | Path, before: dict[str, Any]) -> None:
    after = snapshot(subject)
    if isinstance(subject, Path):
        assert after == before
        return
    values = before["values"], after["values"]
    assert {k: v for k, v in after.items() if k != "values"} == {k: v for k, v in before.items() if k != "values"}
    assert values[0].keys() == values[1].keys()
    for path, tensor in values[0].items():
        assert tensor.is_meta or same_bits(tensor, values[1][path]), path


ALIVE = {"r": 2, "lora_alpha": 64, "init_lora_weights": False}


def adapter_of_net(directory: Path, **settings) -> Path:
    """Saves an adapter of ``Net`` to ``directory``, and returns it."""
    config = LoraConfig(**{"target_modules": ["up"], "modules_to_save": ["head"]} | ALIVE | settings)
    save_adapter(inject(Net(), config), directory)
    return directory


@contextmanager
def refused(subject: nn.Module | Path, error: type[Exception], *fragments: str) -> Iterator[None]:
    """Checks that the body raises ``error`` with every fragment in its text, and changes no model or directory."""
    before = snapshot(subject)
    with pytest.raises(error) as caught:
        yield
    for fragment in fragments:
        assert fragment in str(caught.value), str(caught.value)
    assert_unchanged(subject, before)
