"""Rows of diffusers' models that choose their adapters."""

from __future__ import annotations

import torch
from support.models import refused
from support.rows import with_adapters
from support.tiny_diffusion import TARGETS, unet

from lora_ext import set_adapter
from lora_ext.adapters import choose_adapters


def test_each_row_gets_its_adapter_however_the_arguments_are_passed():
    model, x, text = with_adapters(unet(), list(TARGETS)), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    with torch.no_grad():
        rows = [set_adapter(model, name)(x[i : i + 1], 3, text[i : i + 1]).sample for i, name in enumerate("ab")]
        expected = torch.cat(rows)
        assert not torch.allclose(model(x, 3, text).sample, expected, atol=1e-5)
        for args, kwargs in (
            ((x, 3, text), {}),
            ((), {"timestep": torch.tensor([3]), "encoder_hidden_states": text, "sample": x}),
        ):
            y = model(*args, **kwargs, adapter_names=["a", "b"]).sample
            torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
            with choose_adapters(model, ["a", "b"]):
                assert torch.equal(model(*args, **kwargs).sample, y)


def test_a_batch_with_guidance_has_a_name_for_each_row():
    """Pipelines put the rows of all prompts behind each other twice, and not those of each prompt."""
    model, x, text = with_adapters(unet(), list(TARGETS)), torch.randn(2, 4, 8, 8), torch.randn(4, 5, 32)
    with torch.no_grad():
        single = [model(x, 3, text[i : i + 2], adapter_names=["a", "b"]).sample for i in (0, 2)]
        with (
            choose_adapters(model, ["a", "b"]),
            refused(model, ValueError, "2 names, but argument 1 has 4 rows", "* 2"),
        ):
            model(torch.cat([x, x]), 3, text)
        with choose_adapters(model, ["a", "b"] * 2):
            y = model(torch.cat([x, x]), 3, text).sample
        torch.testing.assert_close(y, torch.cat(single), rtol=1e-4, atol=1e-5)
        with choose_adapters(model, ["a"]):  # the same for all
            y = model(torch.cat([x, x]), 3, text).sample
        assert torch.equal(y, model(torch.cat([x, x]), 3, text, adapter_names=["a"] * 4).sample)
