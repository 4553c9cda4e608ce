"""Adapters in pipelines of diffusers: files for ``load_lora_weights``, and the scale that a call asks for."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from support.models import shaken
from support.optional import diffusers
from support.tiny_diffusion import TARGETS, TEXT_TARGETS, image, pipeline, unet

from lora_ext import LoraConfig, inject, merge
from lora_ext.adapters import unload
from lora_ext.integrations.diffusers import save_lora_weights

pytestmark = [pytest.mark.cpu_only("files are about the CPU"), pytest.mark.full]

DOCUMENT = Path(__file__).parents[2] / "docs" / "diffusers.md"


def config(targets=TARGETS, **options) -> LoraConfig:
    return LoraConfig(r=4, target_modules=targets, **{"lora_alpha": 16, **options})  # alpha is not the rank


def test_load_lora_weights_reads_what_we_save(tmp_path):
    pytest.importorskip("peft")
    pipe = pipeline(tmp_path)
    plain = image(pipe)
    shaken(inject(pipe.unet, config(rank_pattern={"to_q": 2}, alpha_pattern={"to_k": 4}, use_rslora=True)))
    text_only = copy.deepcopy(pipe)
    shaken(inject(pipe.text_encoder, config(TEXT_TARGETS)))
    expected = image(pipe)
    assert (expected - plain).abs().max() > 0.1
    save_lora_weights(pipe, tmp_path / "lora")
    assert [path.name for path in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]

    again = pipeline(tmp_path)
    again.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(image(again), expected, atol=1e-9, rtol=1e-9)

    save_lora_weights(text_only, tmp_path / "lora")  # a model without adapters is left out
    again = pipeline(tmp_path)
    again.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(image(again), image(text_only), atol=1e-9, rtol=1e-9)


def test_named_adapters_and_convolutions(tmp_path):
    pytest.importorskip("peft")
    pipe = pipeline(tmp_path)
    shaken(inject(pipe.unet, config(("conv1", "to_q"), lora_bias=True), "first"))
    expected = image(pipe)
    shaken(inject(pipe.unet, config(), "second"))
    save_lora_weights(pipe, tmp_path / "first", "first")
    again = pipeline(tmp_path)
    again.load_lora_weights(tmp_path / "first")
    torch.testing.assert_close(image(again), expected, atol=1e-9, rtol=1e-9)


def test_what_the_file_cannot_hold_is_refused(tmp_path):
    pipe, target = pipeline(tmp_path), tmp_path / "lora"
    with pytest.raises(ValueError, match=r"no model of StableDiffusionPipeline has an active adapter.*inject\("):
        save_lora_weights(pipe, target)
    inject(pipe.vae, LoraConfig(r=2, target_modules=["conv1"]))
    with pytest.raises(ValueError, match=r"keeps no adapters of its 'vae' with.*save_adapter\(pipeline.vae"):
        save_lora_weights(pipe, target)
    unload(pipe.vae)
    inject(pipe.unet, config(modules_to_save=["conv_out"]))
    with pytest.raises(ValueError, match=r"pipeline.unet holds 'conv_out\..*save_adapter\(pipeline.unet"):
        save_lora_weights(pipe, target)
    with pytest.raises(ValueError, match=r"has an adapter 'other'; the adapters are {'unet': \['default'\]}"):
        save_lora_weights(pipe, target, "other")
    unload(pipe.unet)
    inject(pipe.unet.mid_block, config())
    with pytest.raises(ValueError, match=r"a part of pipeline.unet was injected by itself"):
        save_lora_weights(pipe, target)
    with pytest.raises(TypeError, match="DDPMPipeline has no save_lora_weights"):
        save_lora_weights(diffusers.DDPMPipeline(unet=unet(), scheduler=diffusers.DDPMScheduler()), target)
    assert not target.exists()


def test_python_of_diffusers_md(tmp_path, monkeypatch):
    pytest.importorskip("peft")
    (block,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    names = {"pipe": pipeline(tmp_path), "another": pipeline(tmp_path)}
    plain = image(names["pipe"])
    monkeypatch.chdir(tmp_path)
    exec(block.replace("# ... train pipe.unet ...", "shaken(pipe.unet)"), names | {"shaken": shaken})
    expected = image(names["pipe"])
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(image(names["another"]), expected, atol=1e-9, rtol=1e-9)
    merge(names["pipe"].unet)
    names["pipe"].unet.fuse_qkv_projections()
    torch.testing.assert_close(image(names["pipe"]), expected, atol=1e-9, rtol=1e-9)
