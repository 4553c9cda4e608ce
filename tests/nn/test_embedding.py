"""LoraEmbedding what only embeddings do."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from support.small_nets import TextNet
from torch import nn

from lora_ext import LoraConfig, inject
from lora_ext.nn import EmbeddingAdapter, LoraEmbedding

ALIVE = {"r": 3, "lora_alpha": 6, "init_lora_weights": False}


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_factors_start_as_pefts(init):
    """Compares the shapes and standard deviations of an embedding's and of a linear layer's factors with PEFT's."""
    torch.manual_seed(0)
    config = {"r": 64, "lora_alpha": 8, "init_lora_weights": init, "target_modules": ["tokens", "head"]}
    theirs = peft.get_peft_model(TextNet(), peft.LoraConfig(**config)).base_model.model
    model = inject(TextNet(), LoraConfig(**config))
    tokens, head = model.tokens.adapters.default, model.head.adapters.default
    for mine, yours in (
        (tokens.file_A, theirs.tokens.lora_embedding_A.default),
        (tokens.lora_B, theirs.tokens.lora_embedding_B.default),
        (head.lora_A, theirs.head.lora_A.default.weight),
        (head.lora_B, theirs.head.lora_B.default.weight),
    ):
        assert mine.shape == yours.shape and mine.std().item() == pytest.approx(yours.std().item(), rel=0.15)


def test_gradients_are_dense_on_a_sparse_base_layer():
    base, ids = nn.Embedding(30, 16, sparse=True), torch.tensor([3, 3, 7])
    layer = LoraEmbedding(base, EmbeddingAdapter(30, 16, 4, 8, init_lora_weights=False))
    layer(ids).sum().backward()
    gradient = layer.adapters.default.lora_A.grad
    assert gradient.layout == torch.strided and gradient.any(1).nonzero().flatten().tolist() == [3, 7]
    for A in (gradient, copy.deepcopy(layer).adapters.default.lora_A):  # a token's row is contiguous
        assert A.shape == (30, 4) and A.is_contiguous()
