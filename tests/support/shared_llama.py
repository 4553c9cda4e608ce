"""A small Llama with layers that share inputs, and the same without."""

from __future__ import annotations

import copy

import torch
from support.models import llama
from torch import nn

from lora_ext import LoraConfig, inject
from lora_ext.adapters import input_groups

OPTIONS = {"target_modules": "all-linear", "r": 2, "init_lora_weights": False}


def shared_and_alone(**options) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    base, config = llama(), LoraConfig(**OPTIONS | options)
    shared, alone = inject(copy.deepcopy(base), config), inject(base, config, share_inputs=False)
    alone.load_state_dict(shared.state_dict())
    return shared, alone


def assert_shares(model: nn.Module) -> None:
    assert len(input_groups(model).together) == 4  # q/k/v and gate/up of two blocks
