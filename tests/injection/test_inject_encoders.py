"""nn.TransformerEncoder reads weights in its fast path instead of calling layers: adapters act there, too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lora_ext import LoraConfig, inject, merge_and_unload

ALIVE = {"r": 2, "lora_alpha": 8, "init_lora_weights": False}


def encoder(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


@pytest.mark.cpu_only("a default device switches the encoder's fast path off")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_transformer_encoder_uses_the_adapter_in_eval_mode(norm_first, masked):
    model = encoder(norm_first).eval()
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if masked else None
    kept = ~mask if masked else torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        bare = model(x, src_key_padding_mask=mask)
        if masked and not norm_first:
            assert (bare[~kept] == 0).all()  # the fast path is on: only it zeroes padded positions
        inject(model, LoraConfig(target_modules=["linear1", "linear2"], **ALIVE))
        evaluated = model(x, src_key_padding_mask=mask)
        trained = model.train()(x, src_key_padding_mask=mask)
    assert (evaluated - bare)[kept].abs().max() > 1e-2
    torch.testing.assert_close(evaluated[kept], trained[kept])
    with torch.no_grad():
        again = merge_and_unload(model.eval())(x, src_key_padding_mask=mask)
    torch.testing.assert_close(again[kept], evaluated[kept])
    assert not masked or norm_first or (again[~kept] == 0).all()  # the fast path is on again


def test_transformer_encoder_passes_gradients_in_eval_mode():
    model = inject(encoder().eval(), LoraConfig(target_modules=["linear1"], **ALIVE))
    model(torch.randn(2, 5, 8)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
