"""A Llama's linear layers, and an adapter of random numbers on them, as PEFT writes it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file


def block_shapes(hidden: int, intermediate: int, key_value: int) -> dict[str, tuple[int, int]]:
    """Returns ``(out, in)`` of the linear layers of a block."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (key_value, hidden),
        "self_attn.v_proj": (key_value, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


def save_adapter(folder: Path, layers: dict[str, tuple[int, int]], rank: int) -> None:
    """Writes an adapter to a new folder. layers: ``(out, in)`` of the adapted ones, by their path."""
    folder.mkdir()
    factors = {}
    for path, (out, in_) in layers.items():
        factors[f"base_model.model.{path}.lora_A.weight"] = torch.randn(rank, in_) * in_**-0.5
        factors[f"base_model.model.{path}.lora_B.weight"] = torch.randn(out, rank) * 0.01
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted({path.rpartition(".")[2] for path in layers})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config))
