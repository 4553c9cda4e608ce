"""A tiny UNet of diffusers."""

from __future__ import annotations

import torch
from support.optional import diffusers
from torch import nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


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
