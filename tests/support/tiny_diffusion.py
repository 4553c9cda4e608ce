"""Tiny models of diffusers, and a Stable Diffusion pipeline of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from support.optional import diffusers
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
TEXT_TARGETS = ("q_proj", "v_proj")


def unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
    ).eval()


def denoised(model: nn.Module, **options) -> Tensor:
    like = {"generator": torch.Generator().manual_seed(0), "dtype": model.dtype}
    noise, text = torch.randn(1, 4, 8, 8, **like), torch.randn(1, 5, 32, **like)
    with torch.no_grad():
        return model(noise, 1, text, **options).sample


def pipeline(directory: Path):
    """Stable Diffusion in float64; ``directory`` takes the vocabulary of its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["l", "o", "w", "l</w>", "o</w>", "w</w>", "<|startoftext|>", "<|endoftext|>"]
    (directory / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=16)
    model = unet()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=8,
            hidden_size=32,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=2,
            max_position_embeddings=16,
            bos_token_id=6,
            eos_token_id=7,
            pad_token_id=7,
        )
    ).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=[32], latent_channels=4, norm_num_groups=8).eval()
    made = diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=model,
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made.to(torch.float64)


def image(pipe, **options) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("low", num_inference_steps=2, generator=generator, height=8, width=8, output_type="latent", **options)[
        0
    ]
