"""Saves adapters to one directory repeatedly, one thread per adapter. Arguments: the directory and their numbers.

Starts when a byte arrives on the standard input.
"""

from __future__ import annotations

import sys
import threading

import torch
from torch import nn

from lora_ext import LoraConfig, inject, save_adapter


def adapted(alpha: int) -> nn.Module:
    """Makes a model whose adapter has this ``lora_alpha`` and holds only this number."""
    model = inject(nn.Sequential(nn.Linear(64, 64)), LoraConfig(r=8, lora_alpha=alpha, target_modules=["0"]))
    with torch.no_grad():
        for parameter in model[0].adapters.parameters():
            parameter.fill_(alpha)
    return model


def save(model: nn.Module) -> None:
    for _ in range(25):
        save_adapter(model, sys.argv[1])


if __name__ == "__main__":
    threads = [threading.Thread(target=save, args=[adapted(int(alpha))]) for alpha in sys.argv[2:]]
    print("ready", flush=True)
    sys.stdin.read(1)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
