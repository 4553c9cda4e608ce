"""The part of the table in support/refusals.py for the classes of lora_ext.nn."""

from __future__ import annotations

import copy

import torch
from support.public_calls import Call
from torch import nn

from lora_ext import nn as layers

LAYERS: list[Call] = [
    Call(
        layers.LoraAdapter,
        lambda _: {
            "in_features": 6,
            "out_features": 4,
            "r": 2,
            "lora_alpha": 4.0,
            "lora_dropout": 0.1,
            "use_rslora": False,
            "init_lora_weights": True,
            "lora_bias": False,
            "shapes": None,
            "dtype": torch.float32,
            "device": "cpu",
        },
        [
            ({"in_features": -6}, ValueError, "in_features is -6, want at least 0"),
            ({"r": True}, TypeError, "r is True of type bool, want an integer"),
        ],
    ),
    Call(
        layers.EmbeddingAdapter,
        lambda _: {"num_embeddings": 6, "embedding_dim": 4, "r": 2, "lora_alpha": 4.0},
        [
            ({"num_embeddings": -6}, ValueError, "num_embeddings is -6"),
            ({"r": 0}, ValueError, "r is 0, want at least 1"),
        ],
    ),
    Call(
        layers.PackedAdapter,
        lambda _: {"in_features": 6, "out_features": 6, "r": 2, "lora_alpha": 4.0, "enable_lora": [True, False, True]},
        [
            ({"enable_lora": [False]}, ValueError, "enable_lora is [False], want at least one True"),
            ({"enable_lora": []}, ValueError, "enable_lora is [], want at least one True"),
            ({"enable_lora": [True] * 4}, ValueError, "enable_lora has 4 parts, want a divisor of out_features=6"),
            ({"lora_bias": True}, ValueError, "lora_bias is True"),
            ({"r": 0}, ValueError, "r is 0, want at least 1"),
        ],
    ),
    Call(
        layers.DoraAdapter,
        lambda _: {"in_features": 6, "out_features": 4, "r": 2, "lora_alpha": 4.0},
        [
            ({"lora_bias": True}, ValueError, "DoraAdapter: lora_bias is True"),
            ({"r": 0}, ValueError, "DoraAdapter: r is 0, want at least 1"),
        ],
    ),
    *(
        Call(
            kind,
            lambda _, base=base: {
                "base_layer": copy.deepcopy(base),
                "adapter": None,
                "adapter_name": "a",
                "active": layers.ActiveAdapters(),
            },
            [({"base_layer": nn.ReLU()}, TypeError, f"base_layer is a ReLU, want {kind.base_kinds}")],
        )
        for kind, base in (
            (layers.LoraLinear, nn.Linear(6, 4)),
            (layers.DoraLinear, nn.Linear(6, 4)),
            (layers.LoraEmbedding, nn.Embedding(6, 4)),
            (layers.LoraConv, nn.Conv1d(6, 4, 3)),
            (layers.LoraMultiheadAttention, nn.MultiheadAttention(6, 2)),
        )
    ),
    Call(
        layers.LoraPackedLinear,
        lambda _: {
            "base_layer": nn.Linear(6, 6),
            "num_parts": 3,
            "adapter": None,
            "adapter_name": "a",
            "active": layers.ActiveAdapters(),
        },
        [
            ({"num_parts": 4}, ValueError, "num_parts is 4, want a divisor of out_features=6"),
            ({"num_parts": 0}, ValueError, "num_parts is 0"),
        ],
    ),
    Call(
        layers.LoraParameter,
        lambda _: {
            "base_layer": nn.Linear(6, 4),
            "parameter_name": "weight",
            "adapter": None,
            "adapter_name": "a",
            "active": layers.ActiveAdapters(),
        },
        [
            ({"parameter_name": "x"}, TypeError, "LoraParameter: Linear"),
            ({"parameter_name": "bias"}, TypeError, "bias"),
        ],
    ),
]
