"""Small models around convolutions and embeddings."""

from __future__ import annotations

import torch
from support.models import VOCABULARY
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

# Layers from 6 to 8 channels, named by their spatial dimensions: every kind of stride, padding, dilation and groups.
CONVOLUTIONS = {
    "1d": (nn.Conv1d, {"kernel_size": 3}),
    "1d same": (nn.Conv1d, {"kernel_size": 4, "padding": "same", "dilation": 2}),
    "1d circular": (nn.Conv1d, {"kernel_size": 3, "padding": 2, "padding_mode": "circular", "stride": 2}),
    "2d": (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "2d pointwise": (nn.Conv2d, {"kernel_size": 1, "bias": False}),
    "2d oblong": (nn.Conv2d, {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
    "2d valid": (nn.Conv2d, {"kernel_size": 2, "padding": "valid", "dilation": 3}),
    "2d reflect": (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect", "dilation": 2}),
    "2d replicate": (nn.Conv2d, {"kernel_size": 3, "padding": "same", "padding_mode": "replicate"}),
    "3d": (nn.Conv3d, {"kernel_size": 2, "stride": 2, "padding": 1, "bias": False}),
    "3d same": (nn.Conv3d, {"kernel_size": 3, "padding": "same", "padding_mode": "circular"}),
    "1d grouped": (nn.Conv1d, {"kernel_size": 3, "groups": 2, "padding": 1}),
    "2d grouped": (nn.Conv2d, {"kernel_size": 3, "groups": 2, "stride": 2, "bias": False}),
}


class ConvNet(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        kind, settings = CONVOLUTIONS[name]
        self.conv = kind(6, 8, **settings)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(x)).flatten(2).mean(-1))


def input_of(name: str) -> Tensor:
    """Returns an input of the convolution ``name``."""
    spatial = {"1d": (11,), "2d": (9, 10), "3d": (5, 6, 7)}[name[:2]]
    return torch.randn(3, 6, *spatial, dtype=torch.float64)


class Scaled(nn.Embedding):
    """An embedding that scales its rows by a number, like BART's."""

    embed_scale = 4.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class TextNet(nn.Module):
    """Embeddings of three kinds, the first with padding, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = Gemma3TextScaledWordEmbedding(VOCABULARY, 8, 0, embed_scale=8**0.5)
        self.positions = nn.Embedding(10, 8)
        self.kinds = Scaled(2, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[-1]).expand(ids.shape)
        return self.head(torch.tanh(self.tokens(ids) + self.positions(positions) + self.kinds(positions % 2)))
